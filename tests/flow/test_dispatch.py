"""Giving out work: what it costs the driver, the same for every answer, and how it ends when it cannot go on."""

from __future__ import annotations

import asyncio
import itertools
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
from jf_cluster.collect.dispatch import Dispatcher, DispatchError, Done, GivenUp, Lost, Report
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


def test_a_worker_without_an_environment_is_replaced_and_the_message_says_what_was_wrong_with_it() -> None:
    environments = iter([{"working_dir": "gcs://_ray_pkg_that_nobody_uploaded.zip"}, {}])

    def start(_: int) -> tuple[ActorHandle, ray.ObjectRef]:
        actor = ray.remote(num_cpus=0, runtime_env=next(environments))(Answering).remote()
        return actor, actor.ready.remote()

    dispatcher: Dispatcher[Item, int] = Dispatcher(start, workers=1, timeout_s=120, max_attempts=3)
    lost, done = dispatcher.run([[Item("1")]])
    assert isinstance(lost, Lost) and isinstance(done, Done)
    assert lost.reason.startswith("worker died: OSError: Failed to download runtime_env file package"), lost.reason


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


class Picky(Answering):
    """Fails at batches with an item whose id begins with b or, once it is broken, at all; the others take a moment."""

    broken = False

    async def ready(self, broken: bool = False, after_s: float = 0) -> None:
        self.broken = broken
        await asyncio.sleep(after_s)

    async def run(self, items: list[Item]) -> Report[int]:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access")
        if any(item.prompt_id.startswith("b") for item in items):
            raise ValueError("bad item")
        await asyncio.sleep(0.02)
        return Report(0, [item.prompt_id for item in items])


@pytest.fixture(scope="module")
def pickers(local_ray: None) -> list[ActorHandle]:
    return [ray.remote(num_cpus=0)(Picky).remote() for _ in range(4)]


@pytest.fixture
def picking(pickers: list[ActorHandle], monkeypatch: pytest.MonkeyPatch) -> type[Picking]:
    """Spares a process for each batch that fails: a worker that is replaced is taken up again instead."""
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(Picking, "actors", pickers, raising=False)
    return Picking


class Picking:
    """A run with such workers: what it came to, and how often workers were started in each place."""

    actors: list[ActorHandle]

    def __init__(self, batches: list[list[str]], workers: int, broken: int | None = None) -> None:
        self.starts = [0] * workers
        self.done: list[str] = []
        self.given_up: dict[str, str] = {}

        def start(place: int) -> tuple[ActorHandle, ray.ObjectRef]:
            self.starts[place] += 1
            return self.actors[place], self.actors[place].ready.remote(
                place == broken, 0.5 if broken == 0 < place else 0
            )

        dispatcher: Dispatcher[Item, int] = Dispatcher(
            start, rest=lambda _: None, workers=workers, timeout_s=60, max_attempts=3
        )
        self.events = dispatcher.run([Item(prompt_id) for prompt_id in batch] for batch in batches)

    def go(self) -> Picking:
        for event in self.events:
            match event:
                case Done(items, _):
                    self.done += [item.prompt_id for item in items]
                case GivenUp(item, reason):
                    self.given_up[item.prompt_id] = reason
        return self


def named(letter: str, batches: int, size: int = 4) -> list[list[str]]:
    return [[f"{letter}{batch}.{place}" for place in range(size)] for batch in range(batches)]


def test_a_broken_worker_costs_no_item_and_gets_no_more_batches(
    picking: type[Picking], caplog: pytest.LogCaptureFixture
) -> None:
    """It is there first and fails at once, so it would take most batches, and all three attempts at many an item."""
    run = picking(batches := named("g", 60), workers=2, broken=0).go()
    assert not run.given_up and sorted(run.done) == sorted(itertools.chain(*batches))
    assert run.starts[1] == 1
    (warning,) = [r.getMessage() for r in caplog.records if "gets no more batches" in r.getMessage()]
    assert "worker 0" in warning and "CUDA error: an illegal memory access" in warning


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("size", [1, 32])
def test_where_nothing_succeeds_the_run_ends_before_anything_is_given_up(
    picking: type[Picking], workers: int, size: int
) -> None:
    run = picking(named("b", 30, size), workers)
    with pytest.raises(DispatchError, match=r"all of the first \d+ batches failed.*ValueError: bad item"):
        run.go()
    assert not run.given_up and (workers > 1 or run.starts[0] <= 9), run.starts


@pytest.mark.parametrize("workers", [1, 2])
def test_a_few_bad_items_that_are_all_there_is_left_are_given_up(picking: type[Picking], workers: int) -> None:
    run = picking([["b1", "b2"], ["b3"]], workers).go()
    assert not run.done and run.given_up.keys() == {"b1", "b2", "b3"}
    assert all("failed 3 times" in reason for reason in run.given_up.values()), run.given_up


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_items_in_most_batches_are_given_up_and_no_others(picking: type[Picking], workers: int) -> None:
    good, bad = named("g", 12, 9), named("b", 12, 1)
    run = picking([[*g[:5], *b, *g[5:]] for g, b in zip(good, bad, strict=True)], workers).go()
    assert run.given_up.keys() == set(itertools.chain(*bad))
    assert sorted(run.done) == sorted(itertools.chain(*good))


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
