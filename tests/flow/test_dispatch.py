"""What giving out work costs the driver: the same for every answer, however many workers and batches there are."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from jf_cluster.collect import dispatch
from jf_cluster.collect.dispatch import Dispatcher, Done, Report

pytestmark = pytest.mark.usefixtures("local_ray")

ANSWERS_A_WORKER = 4


@dataclass(frozen=True)
class Item:
    prompt_id: str


class Answering:
    """Answers at once, each batch safe with the next one or with ``finish``; many places may share one such actor."""

    async def ready(self) -> None:
        pass

    async def run(self, items: list[Item]) -> Report[int]:
        return Report(len(items), [item.prompt_id for item in items if not item.prompt_id.endswith("0")])

    async def finish(self) -> list[str]:
        return [f"{i}" for i in range(0, 100_000, 10)]


class Lines:
    """Counts the lines that a module's functions run."""

    def __init__(self, module: types.ModuleType) -> None:
        self.count, self._file = 0, module.__file__

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        return self._ran if frame.f_code.co_filename == self._file else None

    def _ran(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        self.count += event == "line"
        return self._ran


def dispatched(workers: int) -> tuple[int, int, int]:
    """Lines of the dispatcher, answers, and most batches made that were not answered yet."""
    made = 0

    def batches() -> Iterator[list[Item]]:
        nonlocal made
        for made in range(1, ANSWERS_A_WORKER * workers + 1):
            yield [Item(f"{made}")]

    actor = ray.remote(num_cpus=0, max_concurrency=1000)(Answering).remote()
    dispatcher: Dispatcher[Item, int] = Dispatcher(
        lambda _: (actor, actor.ready.remote()), rest=lambda _: None, workers=workers, timeout_s=120, max_attempts=3
    )
    answers = ahead = 0
    with Lines(dispatch) as lines:
        for event in dispatcher.run(batches()):
            assert isinstance(event, Done)
            answers += 1
            ahead = max(ahead, made - answers)
    return lines.count, answers, ahead


def test_an_answer_costs_the_same_with_many_workers_and_batches_are_made_when_they_are_due() -> None:
    cost = {}
    for workers in (4, 80):
        lines, answers, ahead = dispatched(workers)
        assert answers == ANSWERS_A_WORKER * workers and ahead <= workers + 1
        cost[workers] = lines / answers
    assert cost[80] < 1.5 * cost[4], cost
