"""Reading ahead: steps planned in order, read by background threads, handed out in order."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

Step = TypeVar("Step")


class ReadingAhead(ABC, Generic[Step]):
    """What iterates over steps and has some of them read before they are asked for.

    Planning has a thread of its own: while a plan waits, for shards that nobody has written yet say, steps that were
    planned before are read and handed out. Use it as a context manager, or close it, to stop the threads; dropping the
    iterator does so too.
    """

    def __init__(self, prefetch_steps: int, threads: int) -> None:
        self._prefetch_steps = max(1, prefetch_steps)
        self._threads = max(1, threads)
        self._runs: list[_Run[Step]] = []

    @abstractmethod
    def _jobs(self, stop: threading.Event) -> Iterator[Callable[[], Step]]:
        """What to read for each step, in order. When it waits it waits for `stop`, and then ends."""

    def __iter__(self) -> Iterator[Step]:
        """The steps from the given position on; an error of the store is raised at the step it concerns."""
        run = _Run(self._jobs, self._prefetch_steps, self._threads)
        self._runs.append(run)
        try:
            yield from run.results()
        finally:
            run.close()
            if run in self._runs:  # it holds the steps that were read for nothing
                self._runs.remove(run)

    def close(self) -> None:
        """Stop reading ahead."""
        while self._runs:
            self._runs.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Run(Generic[Step]):
    """One iteration's threads and the steps between them and the consumer."""

    def __init__(
        self, jobs: Callable[[threading.Event], Iterator[Callable[[], Step]]], prefetch_steps: int, threads: int
    ) -> None:
        self._stop = threading.Event()
        self._room = threading.Semaphore(prefetch_steps)
        self._planned: SimpleQueue[Future[Step] | None] = SimpleQueue()
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="trajectory-read")
        self._plan: Future[None] = Future()
        # A daemon: it may wait for ever, for room or for shards, and a process that ends by an exception which still
        # holds the iterator would wait for it.
        self._planner = threading.Thread(target=self._submit, args=(jobs,), name="trajectory-plan", daemon=True)
        self._planner.start()

    def _submit(self, jobs: Callable[[threading.Event], Iterator[Callable[[], Step]]]) -> None:
        try:
            for job in jobs(self._stop):
                self._room.acquire()
                if self._stop.is_set():
                    break
                self._planned.put(self._readers.submit(job))
            self._plan.set_result(None)
        except BaseException as error:  # noqa: BLE001  # whatever it is, `results` raises it
            self._plan.set_exception(error)
        finally:
            self._planned.put(None)

    def results(self) -> Iterator[Step]:
        while (future := self._planned.get()) is not None:
            self._room.release()
            yield future.result()
        self._plan.result()  # raises what went wrong in planning

    def close(self) -> None:
        self._stop.set()
        self._room.release()
        self._planner.join()
        self._readers.shutdown(wait=True, cancel_futures=True)
