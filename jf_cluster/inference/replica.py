"""A copy of the model that answers OpenAI's protocol: one ``Scheduler``, and its responses whole or as events.

``Options`` crosses from the command line to the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jinja2 import TemplateError
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jf_cluster.inference.options import DecodingOptions, LoadOptions
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
from jf_cluster.jacobi.decoding import PromptError
from jf_cluster.jacobi.text import TextStream

DEFAULT_TOKENS = 512
"""Longest answer where the request does not say."""
REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str
    name: str
    decoding: DecodingOptions
    loading: LoadOptions
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    rows: int = 4
    queue: int = 16
    context_tokens: int = 4096


@serve.deployment
class Replica:
    """One copy of the model and its HTTP answers."""

    def __init__(self, options: Options) -> None:
        self.options, self.begun = options, int(time.time())
        threads = options.loading.threads or max(1, int(options.cpus))
        self.loaded = replace(options.loading, threads=threads).load(options.model, "cuda" if options.gpus else "cpu")
        self.loaded.plain("")  # The first call takes a saved truncation off, which must not meet one in another thread.
        self.drafting, self.explanation = self.loaded.drafting(**asdict(options.decoding))
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
        alive, busy = self.scheduler.alive, self.scheduler.occupied
        said = {"alive": alive, "requests": busy, "decoding": self.explanation}
        return JSONResponse(said, status_code=200 if alive else 503)  # who asks looks at the status

    async def _chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        assert isinstance(asked, ChatRequest)
        try:
            # Megabytes take seconds, in which other clients' tokens are to arrive.
            prompt = await asyncio.to_thread(self.loaded.chat, [m.plain for m in asked.messages])
        except TemplateError as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error
        return await self._respond(asked, prompt, "chat.completion", asked.limit)

    async def _complete(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        assert isinstance(asked, CompletionRequest)
        text = asked.prompt
        prompt = text if isinstance(text, list) else await asyncio.to_thread(self.loaded.plain, text)
        if not prompt:
            raise RequestError("prompt: it is empty", field="prompt")
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
        self.text = TextStream(scheduler.loaded.decode, asked.stops, ticket.row.prompt)

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
