"""Giving out work: what it costs the driver, the same for every answer, and how it ends when it cannot go on."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jf_cluster.collect import dispatch
from jf_cluster.collect.crew import Crew, WorkerModels
from jf_cluster.collect.dispatch import Dispatcher, DispatchError, Done, Lost, Report
from jf_cluster.models import ModelError
from tests.flow.conftest import small_config

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


class Broken(Answering):
    """Works, but cannot begin or end."""

    def __init__(self, at: str) -> None:
        self.at = at

    async def ready(self) -> None:
        if self.at == "ready":
            raise MemoryError("CUDA out of memory\nand much more")

    async def finish(self) -> list[str]:
        if self.at == "finish":
            raise MemoryError("CUDA out of memory\nand much more")
        return await super().finish()


@pytest.mark.parametrize(("at", "what"), [("ready", "take up its work"), ("finish", "make safe what it had done")])
def test_what_no_other_worker_would_do_better_ends_the_run_in_one_line(at: str, what: str) -> None:
    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0)(Broken).remote(at)
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3)
    with pytest.raises(DispatchError) as raised:
        list(dispatcher.run([[Item("10")]]))
    assert str(raised.value) == (
        f"worker 0 could not {what}: MemoryError: CUDA out of memory; the same command carries on once the cause is "
        "removed"
    )


class Saving(Answering):
    """Tells when it is asked to make safe what it holds."""

    def __init__(self, told: Path) -> None:
        self.told = told

    async def finish(self) -> list[str]:
        self.told.touch()
        return await super().finish()


def test_what_is_held_is_saved_when_the_interrupt_comes_while_the_caller_has_an_event(tmp_path: Path) -> None:
    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0)(Saving).remote(tmp_path / "saved")
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3)
    with pytest.raises(KeyboardInterrupt):
        for _ in dispatcher.run([[Item("10")], [Item("20")]]):
            assert not (tmp_path / "saved").exists()
            raise KeyboardInterrupt
    assert (tmp_path / "saved").exists()


class FullDisk(Saving):
    """Cannot write the second batch."""

    async def run(self, items: list[Item]) -> Report[int]:
        if items[0].prompt_id == "20":
            raise OSError("No space left on device")
        return await super().run(items)


def test_what_is_held_is_saved_whatever_ends_the_run(tmp_path: Path) -> None:
    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0)(FullDisk).remote(tmp_path / "saved")
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3, fatal=(OSError,))
    with pytest.raises(OSError, match="No space left"):
        list(dispatcher.run([[Item("10")], [Item("20")]]))
    assert (tmp_path / "saved").exists()


def test_a_worker_whose_node_is_gone_is_replaced() -> None:
    """Its error is an ActorUnschedulableError, which is no RayActorError."""
    gone = NodeAffinitySchedulingStrategy("0" * 56, soft=False)
    places = iter([gone, "DEFAULT"])

    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0, scheduling_strategy=next(places))(Answering).remote()
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3)
    lost, done = dispatcher.run([[Item("1")]])
    assert isinstance(lost, Lost) and isinstance(done, Done)


def test_a_worker_that_is_killed_for_its_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's memory monitor does when the machine is full, which it is not here: the error is put in its place."""
    monitored: list[Item] = []
    given = Dispatcher._give

    def killed_once(dispatcher: Dispatcher[Item, int], slot: dispatch._Slot[Item]) -> None:
        given(dispatcher, slot)
        if slot.batch and not monitored:
            monitored.extend(slot.batch.items)
            slot.answer = Future()
            slot.answer.set_exception(OutOfMemoryError("Task was killed due to the node running low on memory."))

    monkeypatch.setattr(Dispatcher, "_give", killed_once)

    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0)(Answering).remote()
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3)
    lost, done = dispatcher.run([[Item("1")]])
    assert isinstance(lost, Lost) and "low on memory" in lost.reason
    assert isinstance(done, Done) and done.items == monitored


class Unable:
    """A job that cannot be taken up."""

    def __init__(self, models: WorkerModels) -> None:
        raise ModelError("the model is missing")


def test_a_host_says_why_it_could_not_take_up_a_job(tmp_path: Path, base_model: Path) -> None:
    crew = Crew(small_config(tmp_path, base_model, collect__cpus_per_worker=0))
    with pytest.raises(ModelError, match="the model is missing"):
        crew.ask(60, Unable, (), "look")  # type: ignore[arg-type]


def test_an_answer_costs_the_same_with_many_workers_and_batches_are_made_when_they_are_due() -> None:
    cost = {}
    for workers in (4, 80):
        lines, answers, ahead = dispatched(workers)
        assert answers == ANSWERS_A_WORKER * workers and ahead <= workers + 1
        cost[workers] = lines / answers
    assert cost[80] < 1.5 * cost[4], cost
