"""The OpenAI-compatible server as its clients see it: the real command, the real ``openai`` client, real Ray Serve."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import openai
import psutil
import pytest
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.cluster import ClusterError
from jf_cluster.config import ConfigError
from jf_cluster.inference.loaded import Loaded
from jf_cluster.inference.options import DecodingOptions, LoadOptions
from jf_cluster.inference.replica import Options
from jf_cluster.inference.server import run_server
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE
from jf_cluster.jacobi.sampling import GREEDY, Sampling

ROOT = Path(__file__).parent.parent.parent
ROWS, QUEUE, CONTEXT = 2, 1, 16384


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server; afterwards it must end by itself when asked to.

    The model is allowed long responses here, so that requests last while others are refused or given up.
    """
    target = tmp_path_factory.mktemp("served") / "minuscule"
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "jf_cluster", "serve", str(target), "--port", str(port), "--rows", str(ROWS)),
        *("--queue", str(QUEUE), "--context", str(CONTEXT), "--mode", "jacobi", "--block-size", "6", "--threads", "1"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while "answers at http" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert "jacobi, block size 6" in log.read_text()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def test_a_wider_address_is_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def told(host: str) -> list[str]:
            caplog.clear()
            options = Options(str(directory), "it", DecodingOptions(), LoadOptions(), host=host, port=port)
            with pytest.raises(ClusterError, match=f"port {port} on {host} cannot be had"):
                run_server(options, pytest.fail)
            return caplog.messages

        assert told("127.0.0.1") == []
        (warning,) = told("0.0.0.0")
    assert "server listens on 0.0.0.0 without authentication" in warning and "put a proxy" in warning


def test_what_cannot_be_served_is_refused_with_its_reason(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = Options(str(directory), "minuscule", DecodingOptions(mode="ar"), LoadOptions(), port=port)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def refused(error: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(error, match=match):
            run_server(replace(options, **changes), pytest.fail)

    try:
        refused(ConfigError, "unknown decoding mode 'warp'", decoding=DecodingOptions("warp"))
        refused(ConfigError, "must be at least 1", decoding=DecodingOptions(block_size=0))
        many = r"2 replica\(s\) with --gpus 10000 need 20000 GPU\(s\).*--gpus 0\.5"
        refused(ClusterError, many, replicas=2, gpus=10_000)
        refused(ClusterError, "did not come up: .*ConfigError: unknown dtype 'int3'", loading=LoadOptions("int3"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_model_is_named_after_its_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Options] = []
    monkeypatch.setattr("jf_cluster.inference.server.run_server", lambda options, _: served.append(options))
    monkeypatch.chdir(directory)
    for model in (".", str(directory), "somebody/minuscule"):
        result = CliRunner().invoke(app, ["serve", model, "--gpus", "0"])
        assert result.exit_code == 0 and served.pop().name == "minuscule", result.output


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def expected(loaded: Loaded, ids: list[int], tokens: int, sampling: Sampling = GREEDY, key: int = 0) -> str:
    (made,) = generate(
        loaded.model, [ids], max_new_tokens=tokens, end_ids=loaded.end_ids, drafting=AUTOREGRESSIVE,
        sampling=sampling, keys=[key],
    )  # fmt: skip
    return loaded.decode(made.tokens)


HELLO = [{"role": "user", "content": "Hello"}]


def test_chat_whole_and_streamed(client: openai.OpenAI, loaded: Loaded) -> None:
    whole = client.chat.completions.create(model="minuscule", messages=HELLO, max_completion_tokens=30, temperature=0)
    ids = loaded.chat(HELLO)
    assert whole.choices[0].message.content == expected(loaded, ids, 30)
    assert whole.choices[0].finish_reason == "length" and whole.usage.prompt_tokens == len(ids)
    assert whole.usage.completion_tokens == 30 == whole.usage.total_tokens - len(ids)
    pieces = list(
        client.chat.completions.create(
            model="minuscule", messages=HELLO, max_tokens=30, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected(loaded, ids, 30)
    assert pieces[-1].usage == whole.usage and pieces[-2].choices[0].finish_reason == "length"
    assert [m.id for m in client.models.list().data] == ["minuscule"]


def test_null_says_nothing(client: openai.OpenAI, loaded: Loaded) -> None:
    """As clients send what was not set, and an answer that is given back as a message."""
    first = client.chat.completions.create(model="minuscule", messages=HELLO, max_tokens=5, temperature=0, tools=None)
    answer = first.choices[0].message.model_dump()
    assert answer["content"] == expected(loaded, loaded.chat(HELLO), 5) and answer["refusal"] is None
    messages = [*HELLO, answer, *HELLO]
    second = client.chat.completions.create(model="minuscule", messages=messages, max_tokens=5, temperature=0)
    assert second.choices[0].message.content == expected(loaded, loaded.chat(messages), 5)
    made = client.completions.create(model="minuscule", prompt="a", max_tokens=5, logprobs=None, suffix=None)
    assert made.usage.completion_tokens <= 5


def test_completions_stop_and_sample(client: openai.OpenAI, loaded: Loaded) -> None:
    ids = loaded.plain("abc")
    text = expected(loaded, ids, 30)
    stop = text[4:6]
    made = client.completions.create(model="minuscule", prompt="abc", max_tokens=30, temperature=0, stop=[stop, "@@@"])
    assert made.choices[0].text == text[: text.index(stop)] and made.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model="minuscule", prompt=ids, max_tokens=30, temperature=0.8, top_p=0.9, seed=11, stream=True
    )
    sampled = expected(loaded, ids, 30, Sampling(0.8, top_p=0.9), key=11)
    assert "".join(piece.choices[0].text for piece in streamed) == sampled != text


def test_wrong_requests_get_their_reason(client: openai.OpenAI, server: str) -> None:
    def refused(**fields: object) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**({"model": "minuscule", "messages": HELLO} | fields))
        return caught.value

    assert "temperature: Input should be" in refused(temperature=3).message
    assert "n: Input should be 1" in refused(n=2).message
    assert "tools: this server does not know or serve it" in refused(tools=[]).message
    assert "stop: Value error, at most 8 stop strings" in refused(stop=[""]).message
    assert refused(model="other").status_code == 404
    too_long = refused(max_tokens=CONTEXT)
    assert too_long.status_code == 400 and too_long.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="prompt: it is empty") as caught:
        client.completions.create(model="minuscule", prompt="")
    assert caught.value.code == "invalid_request" and caught.value.param == "prompt"
    for body, status, message in (
        (b"{", 400, "the request is not JSON"),
        (b"[" * 100_000, 400, "the request is not JSON: maximum recursion depth"),
        (
            b'{"model": "minuscule", "messages": [{"role": "user", "content": "\\ud83d"}]}',
            400,
            "surrogates not allowed",
        ),
        (b'{"model": "minuscule", "messages": null}', 400, "messages: Field required"),
        (b"[]", 400, "the request: Input should be a valid dictionary"),
        (b'{"model": "minuscule"}', 400, "messages: Field required"),
        (b" " * (5 << 20), 413, "more than"),
    ):
        answer = client._client.post(f"{server}/v1/chat/completions", content=body)
        assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert client._client.get(f"{server}/v1/chat/completions").status_code == 405
    assert client._client.get(f"{server}/v2").status_code == 404


def occupied(client: openai.OpenAI, server: str) -> int:
    return client._client.get(f"{server}/health").json()["requests"]


def until(condition, message: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


LONG = {"model": "minuscule", "messages": HELLO, "max_tokens": CONTEXT - 100, "temperature": 0}


def test_too_many_requests_get_429_and_clients_that_leave_free_their_places(
    client: openai.OpenAI, server: str, loaded: Loaded
) -> None:
    streams = [client.chat.completions.create(stream=True, **LONG) for _ in range(ROWS + QUEUE)]
    until(lambda: occupied(client, server) == ROWS + QUEUE, "the requests did not arrive")
    with pytest.raises(openai.RateLimitError, match="2 requests are being answered and 1 wait") as caught:
        client.chat.completions.create(**LONG)
    assert caught.value.response.headers["retry-after"] == "1"
    next(iter(streams[0]))
    for stream in streams:
        stream.close()
    until(lambda: occupied(client, server) == 0, "places were not freed")
    # A client that waits for the whole answer and gives up.
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.5).chat.completions.create(**LONG)
    until(lambda: occupied(client, server) == 0, "the place was not freed")
    made = client.chat.completions.create(**(LONG | {"max_tokens": 10}))
    assert made.choices[0].message.content == expected(loaded, loaded.chat(HELLO), 10)


def test_it_listens_on_loopback_only(server: str) -> None:
    port = int(server.rsplit(":", 1)[1])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}
