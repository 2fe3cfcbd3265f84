"""``python -m jf_cluster serve``: OpenAI's protocol over HTTP on Ray Serve, on 127.0.0.1 unless told otherwise.

A replica holds the model and one ``Scheduler``. Its answers are the ones AR would give with the same seed, whatever
else is being decoded beside them. ``Options`` crosses from the command line to the replicas.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import ray
from jinja2 import TemplateError
from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jf_cluster.cluster import ClusterError
from jf_cluster.inference.loaded import load
from jf_cluster.inference.protocol import (
    LAST_EVENT,
    ChatRequest,
    CompletionRequest,
    RequestError,
    event,
    parse,
    usage,
)
from jf_cluster.inference.scheduler import BusyError, Scheduler, StoppedError, Ticket
from jf_cluster.jacobi.attention import check_model
from jf_cluster.jacobi.decoding import PromptError
from jf_cluster.jacobi.text import TextStream
from jf_cluster.models import resolve, tokenizer_of

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 512
"""Longest answer where the request does not say."""
REASONS = {"end": "stop", "stop": "stop", "length": "length"}
STARTING_S = 600.0
OBJECT_STORE_BYTES = 128 << 20


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    rows: int = 4
    queue: int = 16
    context_tokens: int = 4096
    mode: str = "auto"
    block_size: int | None = None
    blocks: int | None = None
    pool: int | None = None
    dtype: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False


@serve.deployment
class Replica:
    """One copy of the model and its HTTP answers."""

    def __init__(self, options: Options) -> None:
        self.options, self.begun = options, int(time.time())
        device = "cuda" if options.gpus else "cpu"
        self.loaded = load(
            options.model,
            dtype=options.dtype,
            device=device,
            threads=options.threads or max(1, int(options.cpus)),
            trust_remote_code=options.trust_remote_code,
        )
        check_model(self.loaded.model)
        self.drafting, self.explanation = self.loaded.drafting(
            options.mode, block_size=options.block_size, blocks=options.blocks, pool=options.pool
        )
        self.scheduler = Scheduler(
            self.loaded,
            self.drafting,
            rows=options.rows,
            queue=options.queue,
            context_tokens=options.context_tokens,
        )

    def describe(self) -> str:
        """How this replica decodes, for whoever started it."""
        return self.explanation

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose decoding thread has ended."""
        if not self.scheduler.alive:
            raise StoppedError("the decoder has stopped")

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except RequestError as error:
            headers = {"Retry-After": "1"} if error.status == 429 else None
            return JSONResponse(error.body(), status_code=error.status, headers=headers)
        except ClientDisconnect:
            return Response(status_code=499)

    async def _answer(self, request: Request) -> Response:
        known: dict[tuple[str, str], Callable[[Request], Any]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._complete,
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
        }
        path = request.url.path.rstrip("/")
        answer = known.get((request.method, path))
        if answer is not None:
            response: Response = await answer(request)
            return response
        if any(path == there for _, there in known):
            raise RequestError(f"{path} does not take {request.method}", status=405, code="method_not_allowed")
        raise RequestError(f"there is nothing at {path}", status=404, code="not_found")

    async def _models(self, _: Request) -> Response:
        model = {"id": self.options.name, "object": "model", "created": self.begun, "owned_by": "jf_cluster"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        busy = self.scheduler.occupied
        return JSONResponse({"alive": self.scheduler.alive, "requests": busy, "decoding": self.explanation})

    async def _chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        assert isinstance(asked, ChatRequest)
        try:
            prompt = self.loaded.chat([m.plain for m in asked.messages])
        except TemplateError as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error
        return await self._respond(asked, prompt, "chat.completion", asked.limit)

    async def _complete(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        assert isinstance(asked, CompletionRequest)
        prompt = asked.prompt if isinstance(asked.prompt, list) else self.loaded.plain(asked.prompt)
        vocabulary = self.loaded.model.config.vocab_size
        if any(not 0 <= token < vocabulary for token in prompt):
            raise RequestError(f"prompt: token ids must lie in 0 … {vocabulary - 1}", field="prompt")
        return await self._respond(asked, prompt, "text_completion", asked.limit)

    async def _respond(
        self, asked: ChatRequest | CompletionRequest, prompt: list[int], kind: str, limit: int | None
    ) -> Response:
        if asked.model != self.options.name:
            message = f"there is no model {asked.model!r} here, only {self.options.name!r}"
            raise RequestError(message, status=404, code="model_not_found", field="model")
        room = max(1, self.scheduler.context_tokens - len(prompt))
        try:
            ticket = self.scheduler.submit(
                prompt,
                max_new_tokens=min(DEFAULT_TOKENS, room) if limit is None else limit,
                sampling=asked.sampling,
                key=asked.key,
                stop=asked.stops,
            )
        except PromptError as error:
            raise RequestError(str(error), code="context_length_exceeded") from error
        except BusyError as error:
            raise RequestError(f"{error}: try again later", status=429, code="too_many_requests") from error
        except StoppedError as error:
            raise RequestError(str(error), status=503, code="stopped") from error
        answer = _Answer(kind, self.options.name, asked, ticket, self.scheduler)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(await answer.whole())


class _Answer:
    """One response in OpenAI's shapes, whole or as events."""

    def __init__(
        self,
        kind: str,
        model: str,
        asked: ChatRequest | CompletionRequest,
        ticket: Ticket,
        scheduler: Scheduler,
    ) -> None:
        self.kind, self.asked, self.ticket, self.scheduler = kind, asked, ticket, scheduler
        self.chat = kind == "chat.completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.text = TextStream(scheduler.loaded.decode, asked.stops)

    async def whole(self) -> dict[str, Any]:
        """The response when it is complete; a client that goes away meanwhile frees its place."""
        parts = []
        try:
            async with contextlib.aclosing(self.scheduler.tokens(self.ticket)) as arriving:
                async for tokens in arriving:
                    parts.append(self.text.feed(tokens))
        except StoppedError as error:
            raise RequestError(str(error), status=503, code="stopped") from error
        text = "".join([*parts, self.text.finish()])
        message = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **message, "logprobs": None, "finish_reason": self._reason()}
        return {"object": self.kind, **self.head, "choices": [choice], "usage": self._usage(), "jacobi": self._cost()}

    async def events(self) -> AsyncIterator[bytes]:
        """The response piece by piece, one event for every forward pass that wrote text."""
        try:
            if self.chat:
                yield self._piece({"delta": {"role": "assistant", "content": ""}})
            async with contextlib.aclosing(self.scheduler.tokens(self.ticket)) as arriving:
                async for tokens in arriving:
                    if text := self.text.feed(tokens):
                        yield self._piece(self._delta(text))
            if text := self.text.finish():
                yield self._piece(self._delta(text))
            yield self._piece({"delta": {}} if self.chat else {"text": ""}, self._reason())
            if self.asked.with_usage:
                yield event(self._chunk([]) | {"usage": self._usage(), "jacobi": self._cost()})
            yield LAST_EVENT
        except StoppedError as error:
            yield event(RequestError(str(error), status=503, code="stopped").body())
        finally:
            self.scheduler.cancel(self.ticket)  # also when the client left before the first token

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        return {"object": kind, **self.head, "choices": choices}

    def _piece(self, what: dict[str, Any], reason: str | None = None) -> bytes:
        return event(self._chunk([{"index": 0, **what, "logprobs": None, "finish_reason": reason}]))

    def _reason(self) -> str:
        return REASONS[self.ticket.row.reason or "length"]

    def _usage(self) -> dict[str, int]:
        return usage(len(self.ticket.row.prompt), len(self.ticket.row.tokens))

    def _cost(self) -> dict[str, float | int]:
        """What the answer took: not OpenAI's, ignored by clients that do not know it."""
        row = self.ticket.row
        forwards = len(row.accepted_runs) - 1
        return {"forwards": forwards, "tokens_per_forward": (len(row.tokens) - 1) / forwards if forwards else 1.0}


def run_server(options: Options, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ModelError, ConfigError: the model or a setting cannot be used; told before Ray is started where possible.
        ClusterError: the port is taken, or the replicas did not come up.
    """
    resolve(options.model)
    tokenizer_of(options.model, options.trust_remote_code)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ClusterError(f"port {options.port} on {options.host} cannot be had: {error.strerror}") from error
    _connect(options)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        replica = Replica.options(
            num_replicas=options.replicas,
            # More than the scheduler takes, so that it is the scheduler who answers 429.
            max_ongoing_requests=4 * (options.rows + options.queue) + 16,
            ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        )
        try:
            handle = serve.run(replica.bind(options), name="jf_cluster", route_prefix="/")
            explanation = handle.describe.remote().result(timeout_s=STARTING_S)
        except (RuntimeError, RayServeException, TimeoutError) as error:
            raise ClusterError(f"the server did not come up: {error}") from error
        say(f"decoding: {explanation}")
        say(f"{options.name} answers at http://{options.host}:{options.port}/v1 (Ctrl-C ends it)")
        while not stopped.wait(1.0):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _connect(options: Options) -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        return
    needed = options.replicas * options.cpus + 1
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(needed + 0.999)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
