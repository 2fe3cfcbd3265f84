"""Requests share one batch, wait their turn, are refused beyond it, free their place, and do not hold up each other."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from jf_cluster.inference.loaded import Loaded
from jf_cluster.inference.replica import Replica
from jf_cluster.inference.scheduler import BusyError, Scheduler, StoppedError, Ticket
from jf_cluster.jacobi.decoding import PromptError, generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.sampling import GREEDY, Sampling

DRAFTING = Drafting("multiblock", 4, pool=2)


@pytest.fixture
def scheduler(loaded: Loaded) -> Iterator[Scheduler]:
    made = Scheduler(loaded, DRAFTING, rows=2, queue=3, context_tokens=200)
    yield made
    made.stop()


async def read(scheduler: Scheduler, ticket: Ticket) -> list[int]:
    return [token async for tokens in scheduler.tokens(ticket) for token in tokens]


def test_requests_of_all_kinds_get_what_they_would_get_alone(loaded: Loaded, scheduler: Scheduler) -> None:
    kinds = [GREEDY, Sampling(0.9), GREEDY, Sampling(0.7, top_k=20), GREEDY]
    prompts = [loaded.plain(text) for text in ("one", "the second", "3", "a fourth prompt", "five")]

    async def ask() -> list[list[int]]:
        tickets = [
            scheduler.submit(p, max_new_tokens=20 + i, sampling=kind, key=i)
            for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))
        ]
        with pytest.raises(BusyError, match="2 requests are being answered and 3 wait"):
            scheduler.submit(prompts[0], max_new_tokens=5, sampling=GREEDY, key=0)
        return await asyncio.gather(*(read(scheduler, t) for t in tickets))

    got = asyncio.run(ask())
    for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        (alone,) = generate(
            loaded.model, [prompt], max_new_tokens=20 + i, end_ids=loaded.end_ids, drafting=AUTOREGRESSIVE,
            sampling=kind, keys=[i],
        )  # fmt: skip
        assert got[i] == alone.tokens
    assert scheduler.occupied == 0


def test_a_request_that_is_given_up_frees_its_place(loaded: Loaded, scheduler: Scheduler) -> None:
    async def ask() -> None:
        def submit() -> Ticket:
            return scheduler.submit(loaded.plain("x"), max_new_tokens=190, sampling=GREEDY, key=0)

        tickets = [submit() for _ in range(5)]
        with pytest.raises(BusyError):
            submit()
        scheduler.cancel(tickets[4])  # one that waits leaves at once
        tickets[4] = submit()
        first = scheduler.tokens(tickets[0])
        assert len(await anext(first)) >= 1
        await first.aclose()  # one that runs leaves after the forward pass under way
        assert len(await read(scheduler, tickets[1])) == 190
        for ticket in tickets[2:]:
            scheduler.cancel(ticket)
        for _ in range(200):
            if scheduler.occupied == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{scheduler.occupied} places are still taken")

    asyncio.run(ask())


def test_what_does_not_fit_is_refused_and_a_stopped_scheduler_says_so(loaded: Loaded) -> None:
    scheduler = Scheduler(loaded, DRAFTING, rows=1, queue=1, context_tokens=100)

    async def ask() -> None:
        with pytest.raises(PromptError, match="exceeds the 100 this server allows"):
            scheduler.submit([1] * 60, max_new_tokens=60, sampling=GREEDY, key=0)
        with pytest.raises(PromptError, match="is empty"):
            scheduler.submit([], max_new_tokens=60, sampling=GREEDY, key=0)
        tickets = [scheduler.submit([1, 2], max_new_tokens=98, sampling=GREEDY, key=0) for _ in range(2)]
        await asyncio.to_thread(scheduler.stop)
        for ticket in tickets:
            with pytest.raises(StoppedError):
                await read(scheduler, ticket)
        with pytest.raises(StoppedError):
            scheduler.submit([1], max_new_tokens=2, sampling=GREEDY, key=0)

        replica = SimpleNamespace(scheduler=scheduler, explanation="")
        answer = await Replica.func_or_class._health(replica, None)
        assert answer.status_code == 503 and json.loads(answer.body)["alive"] is False

    asyncio.run(ask())
    assert not scheduler.alive


@pytest.mark.parametrize(("way", "asked"), [("_chat", {"messages": [{"role": "user", "content": "a"}]}),
                                            ("_complete", {"prompt": "a"})])  # fmt: skip
def test_others_go_on_while_a_long_prompt_is_tokenized(way: str, asked: dict) -> None:
    others = threading.Event()

    def tokenized(_: object) -> list[int]:
        assert others.wait(5), "the loop stood still"
        return [1]

    async def body() -> bytes:
        return json.dumps({"model": "it", **asked}).encode()

    async def respond(_: object, prompt: list[int], *__: object) -> list[int]:
        return prompt

    async def ask() -> list[int]:
        asyncio.get_running_loop().call_later(0.05, others.set)
        return await getattr(Replica.func_or_class, way)(replica, SimpleNamespace(body=body))

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2))
    replica = SimpleNamespace(loaded=SimpleNamespace(chat=tokenized, plain=tokenized, model=model), _respond=respond)
    assert asyncio.run(ask()) == [1]
