"""Work for Ray actors: batches given out one at a time, workers that die or hang replaced, bad items isolated.

Nothing here knows what a batch is for. A worker is any actor with ``run(batch) -> Report`` and ``finish() ->
list[id]``; a report names the items whose results are safe on disk, and only those are counted as done, so whatever a
dead worker still held in memory is given out again.

An item that brings its worker down takes the rest of its batch down with it. So a failed batch is split, into eighths
and then into single items, until the culprit stands alone; an item that failed alone or ``max_attempts`` times is
given up with its last reason. Items that merely shared the batch are redone in other batches.

A worker may be what is broken, the GPU it has for instance; then it fails fast and is always there to take the next
batch. So no item is given up before it failed in two places, where there are two; a place whose batches keep failing
while those of others succeed gets no more of them; and where nothing at all succeeds the run ends.

What an answer costs does not depend on the number of workers: Ray puts each into a queue as it comes, and all workers
are looked at only once a second, for those that are late. Batches are made one ahead of the workers, so their number
does not matter either.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError, RuntimeEnvSetupError

from jf_cluster.collect.failures import Failures, Place
from jf_cluster.messages import first_line, last_line
from jf_cluster.stopping import raise_if_asked

logger = logging.getLogger(__name__)

PARTS = 8
POLL_S = 1.0
SAVE_S = 20.0


class Item(Protocol):
    """What a batch consists of; the id tells items apart."""

    @property
    def prompt_id(self) -> str: ...


T = TypeVar("T", bound=Item)
R = TypeVar("R")


class DispatchError(RuntimeError):
    """Workers cannot be started or kept alive, or none does its work; the message carries the last reason."""


@dataclass(frozen=True)
class Report(Generic[R]):
    """What a worker says about a batch: its result, and the ids (of this or earlier batches) that are now safe."""

    result: R
    durable: list[str]


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """A batch that was worked on."""

    items: Sequence[T]
    result: R


@dataclass(frozen=True)
class Lost:
    """A worker that died, hung or failed, and was replaced where need be."""

    worker: int
    reason: str
    redone: int
    """Items it had and which are given out again."""


@dataclass(frozen=True)
class GivenUp(Generic[T]):
    """An item that failed every time."""

    item: T
    reason: str


Event = Done[T, R] | Lost | GivenUp[T]


@dataclass(eq=False)
class _Batch(Generic[T]):
    items: Sequence[T]
    attempts: int = 0
    failed_in: int | None = None
    """Number of the slot in which it, or what it is a part of, failed last."""


@dataclass
class _Slot(Generic[T]):
    """One place for a worker: its actor, what it works on and what it holds that is not safe yet."""

    number: int
    actor: ActorHandle
    answer: Future[Any] = field(default_factory=Future)
    since: float = 0.0
    batch: _Batch[T] | None = None
    held: dict[str, T] = field(default_factory=dict)
    finishing: bool = False
    idle: bool = False
    started: bool = True
    """False where the worker before could not be started and this one is not ready yet."""
    retired: bool = False
    """Its worker gets no batches; it stays, so that Ray gives what is broken to no other."""
    place: Place = field(default_factory=Place)


class Dispatcher(Generic[T, R]):
    """Gives batches to ``workers`` actors and yields what happened.

    Args:
        start: called with the number of a place, gives its actor and a task that ends when the actor is ready; called
            again when that place's worker died.
        rest: takes over actors that have nothing left to do; without it they are killed, as are those that failed.
        stop: set by another thread to end the run as if it were interrupted.
        timeout_s: a batch that takes longer is taken away, its worker is killed and replaced.
        start_timeout_s: a worker must be ready within this time.
        fatal: exception classes that, raised inside a worker, end the run instead of counting against a batch.
    """

    def __init__(
        self,
        start: Callable[[int], tuple[ActorHandle, ray.ObjectRef]],
        *,
        rest: Callable[[ActorHandle], None] = ray.kill,
        stop: threading.Event | None = None,
        workers: int,
        timeout_s: float,
        max_attempts: int,
        start_timeout_s: float = 900.0,
        fatal: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._start, self._rest = start, rest
        self._stop = stop or threading.Event()
        self._workers = workers
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._max_attempts = max_attempts
        self._fatal = fatal
        self._slots: list[_Slot[T]] = []
        self._idle: deque[_Slot[T]] = deque()
        self._unsafe: set[int] = set()
        """Numbers of the slots that have a batch or hold what is not safe."""
        self._answered: queue.SimpleQueue[_Slot[T]] = queue.SimpleQueue()
        self._fresh: Iterator[_Batch[T]] = iter(())
        self._queue: deque[_Batch[T]] = deque()
        """What comes next: what a lost worker held, and fresh batches."""
        self._failed: deque[_Batch[T]] = deque()
        """Parts of failed batches, which come after all fresh ones once any batch succeeded."""
        self._elsewhere: deque[_Batch[T]] = deque()
        """Single items of which the next failure may be the last: for another slot, if there is one."""
        self._given_up: deque[GivenUp[T]] = deque()
        """Told when a batch has succeeded, so that it is known not to be the workers."""
        self._failures = Failures(workers, PARTS)
        self._failed_starts = 0
        self._largest = 1
        self.ready_after_s: float | None = None
        """From the begin of the run to the first worker that was ready."""

    def run(self, batches: Iterable[Sequence[T]]) -> Iterator[Event[T, R]]:
        """Work through all batches; ends when every item is safe or given up.

        Raises:
            DispatchError: workers cannot be started, or cannot take up their work or end it, or all batches fail.
        """
        begun = time.monotonic()
        self._fresh = (_Batch(items) for items in batches)
        try:
            for number, batch in enumerate(itertools.islice(self._fresh, self._workers)):
                self._append(batch)
                self._slots.append(self._place(number))
            late_at = time.monotonic() + POLL_S
            while self._more() or self._elsewhere or self._unsafe:
                if self._stop.is_set():
                    raise KeyboardInterrupt
                raise_if_asked()
                try:
                    slot = self._answered.get(timeout=POLL_S)
                except queue.Empty:
                    pass
                else:
                    if self.ready_after_s is None:
                        self.ready_after_s = time.monotonic() - begun
                    if slot is self._slots[slot.number] and not slot.retired:  # else it was replaced before it answered
                        yield from self._take(slot)
                while self._given_up and self._failures.done:
                    yield self._given_up.popleft()
                if time.monotonic() >= late_at:
                    yield from self._lose_late_ones()
                    late_at = time.monotonic() + POLL_S
                while self._idle and self._more():
                    self._give(self._idle.popleft())
                for _ in range(len(self._idle) if self._elsewhere else 0):
                    self._give(self._idle.popleft())
            if self._given_up:
                self._end_if_all_fail(self._given_up[-1].reason)
            yield from self._given_up
        except BaseException:  # an interrupt that came while the caller had an event is GeneratorExit
            self._save()
            raise
        finally:
            for slot in self._slots:
                (self._rest if slot.idle else ray.kill)(slot.actor)

    def _more(self) -> bool:
        """Whether there is a batch to give out; makes the next one if need be."""
        if not self._queue:
            if self._failed and not self._failures.done:  # parts of a batch tell soonest whether all of it is to blame
                self._queue.append(self._failed.popleft())
            elif (fresh := next(self._fresh, None)) is not None:
                self._append(fresh)
            elif self._failed:
                self._queue.append(self._failed.popleft())
        return bool(self._queue)

    def _append(self, fresh: _Batch[T]) -> None:
        self._queue.append(fresh)
        self._largest = max(self._largest, len(fresh.items))

    def _save(self) -> None:
        """Have workers put on disk what they hold, before they are killed because the run is left early."""
        tasks = [slot.actor.finish.remote() for slot in self._slots if slot.held]
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=SAVE_S)

    def _place(self, number: int) -> _Slot[T]:
        actor, ready = self._start(number)
        slot: _Slot[T] = _Slot(number, actor)
        self._await(slot, ready)
        return slot

    def _await(self, slot: _Slot[T], task: ray.ObjectRef) -> None:
        slot.since, slot.answer = time.monotonic(), task.future()
        slot.answer.add_done_callback(lambda _: self._answered.put(slot))

    def _give(self, slot: _Slot[T]) -> None:
        """Give a worker a batch or, when there is none, have it make safe what it holds."""
        slot.idle = False
        if self._more():
            slot.batch = self._queue.popleft()
        elif (batch := next((b for b in self._elsewhere if self._may_have(slot, b)), None)) is not None:
            self._elsewhere.remove(batch)
            slot.batch = batch
        if slot.batch is not None:
            self._unsafe.add(slot.number)
            self._await(slot, slot.actor.run.remote(slot.batch.items))
        elif slot.held:
            slot.finishing = True
            self._await(slot, slot.actor.finish.remote())
        else:
            slot.idle = True
            self._idle.append(slot)

    def _may_have(self, slot: _Slot[T], batch: _Batch[T]) -> bool:
        return slot.number != batch.failed_in or not self._has_others(slot)

    def _has_others(self, slot: _Slot[T]) -> bool:
        """Whether there are other slots that get batches; one for which there is no room at present is none."""
        return any(other.started and not other.retired for other in self._slots if other.number != slot.number)

    def _lose_late_ones(self) -> Iterator[Event[T, R]]:
        for slot in list(self._slots):
            limit = self._timeout_s if slot.batch or slot.finishing else self._start_timeout_s
            if not slot.idle and not slot.retired and time.monotonic() - slot.since > limit:
                yield from self._lose(slot, f"no answer within {limit:.0f} s")

    def _take(self, slot: _Slot[T]) -> Iterator[Event[T, R]]:
        """Fetch what a slot's finished task left: a report, safe ids, a worker's readiness, or a failure."""
        try:
            value = slot.answer.result()
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, self._fatal):
                raise cause from error
            if slot.batch is None:  # the next worker would meet it again
                what = "make safe what it had done" if slot.finishing else "take up its work"
                raise DispatchError(
                    f"worker {slot.number} could not {what}: {type(cause).__name__}: {first_line(cause)}; the same "
                    "command carries on once the cause is removed"
                ) from error
            # The worker lives on, but what the failed batch left in it cannot be trusted.
            yield from self._lose(slot, f"{type(cause).__name__}: {first_line(cause)}")
            return
        except RayError as error:  # not only RayActorError: of a worker killed for its memory it is OutOfMemoryError
            if isinstance(error, ActorDiedError) and error.actor_init_failed:
                raise DispatchError(f"a worker could not start: {last_line(error)}") from error
            if isinstance(error, ActorUnavailableError):
                logger.warning("worker %d does not answer: %s", slot.number, error)
            # Ray's first line only says that a worker's environment could not be set up, its last one why.
            says = last_line if isinstance(error, RuntimeEnvSetupError) else first_line
            yield from self._lose(slot, f"worker died: {says(error)}")
            return
        batch, slot.batch, slot.finishing = slot.batch, None, False
        self._failed_starts, slot.started = 0, True
        if batch is not None:
            self._failures.succeeded(slot.place)
            slot.held.update((item.prompt_id, item) for item in batch.items)
        for safe in value.durable if batch is not None else value or ():
            slot.held.pop(safe, None)
        if not slot.held:
            self._unsafe.discard(slot.number)
        self._give(slot)
        if batch is not None:
            yield Done(batch.items, value.result)

    def _lose(self, slot: _Slot[T], reason: str) -> Iterator[Event[T, R]]:
        """Replace a slot's worker and put its work back: the failed batch in parts, the rest as it was."""
        ray.kill(slot.actor)
        started = slot.batch is not None or slot.finishing
        if not started:
            self._failed_starts += 1
            if self._failed_starts > self._max_attempts * self._workers:
                raise DispatchError(f"workers keep failing while they start: {reason}")
        held = list(slot.held.values())
        yield Lost(slot.number, reason, len(held) + (len(slot.batch.items) if slot.batch else 0))
        for start in range(0, len(held), self._largest):
            self._queue.appendleft(_Batch(held[start : start + self._largest]))
        self._unsafe.discard(slot.number)
        if slot.batch is not None:
            self._failures.count(slot.place, len(slot.batch.items) if slot.batch.attempts == 0 else 0)
            failing = [other.place.failures > 0 for other in self._slots if other.started and not other.retired]
            if 2 * sum(failing) > len(failing):  # else one that fails fast is ahead of the others
                self._end_if_all_fail(reason)
        new = self._slots[slot.number] = self._place(slot.number)
        new.started, new.place = started, slot.place
        if self._failures.suspect(slot.place) and self._has_others(slot):
            new.retired = True
            logger.warning(
                "worker %d gets no more batches: the last %d failed in its place while those of other workers "
                "succeeded, so its GPU or machine may be broken; the last reason: %s",
                *(slot.number, slot.place.failures, reason),
            )
        if slot.batch is not None:
            self._split(slot, slot.batch, reason)

    def _end_if_all_fail(self, reason: str) -> None:
        if self._failures.total and self._max_attempts > 1:
            raise DispatchError(
                f"all of the first {self._failures.failed} batches failed, the last one with: {reason}; nothing is "
                "given up for it: the same command carries on once the cause is removed, or with "
                "collect.max_attempts=1 if it is what the batches hold"
            )

    def _split(self, slot: _Slot[T], batch: _Batch[T], reason: str) -> None:
        """Put the parts of a failed batch back; an item that failed alone often enough is given up."""
        attempts, alone = batch.attempts + 1, len(batch.items) == 1
        elsewhere_too = batch.failed_in not in (None, slot.number) or not self._has_others(slot)
        if alone and attempts >= self._max_attempts and elsewhere_too:
            self._given_up.append(GivenUp(batch.items[0], f"failed {attempts} times, the last time: {reason}"))
            return
        last = attempts >= self._max_attempts - 1
        size = 1 if last else -(-len(batch.items) // PARTS)
        parts = self._elsewhere if last or alone else self._failed
        for start in range(0, len(batch.items), size):
            parts.append(_Batch(batch.items[start : start + size], attempts, slot.number))
