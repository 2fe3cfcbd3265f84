"""Progress of a long stage: a bar in a terminal, a line now and then where output is a log."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LINE_EVERY_S = 15.0

Tell = Callable[[str, int, int, float, str], None]
"""Told of every advance: unit, done, total, per second, note."""


class Meter:
    """Counts what is done of a total and says how fast it goes and how long it still takes."""

    def __init__(self, label: str, total: int, done: int, bar: Progress | None, tell: Tell | None) -> None:
        self.label, self.total, self.done = label, total, done
        self._tell = tell
        self.begun = self._said_at = time.monotonic()
        self._before = done
        self._bar = bar
        self._task = bar.add_task(label, total=total, completed=done, figures="") if bar else None

    @property
    def per_second(self) -> float:
        """Items per second since this process began (what an earlier one did is not counted)."""
        return (self.done - self._before) / max(time.monotonic() - self.begun, 1e-9)

    def advance(self, count: int, note: str = "") -> None:
        """Count items as done; ``note`` stands beside the rate."""
        self.done += count
        if self._tell is not None:
            self._tell("prompts", self.done, self.total, self.per_second, note)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, figures=f"{self.per_second:.1f}/s {note}")
        elif time.monotonic() - self._said_at >= LINE_EVERY_S or self.done >= self.total:
            self._said_at = time.monotonic()
            left_s = (self.total - self.done) / self.per_second if self.per_second > 0 else float("inf")
            logger.info(
                "%s: %d of %d, %.1f/s, %s left %s",
                self.label,
                self.done,
                self.total,
                self.per_second,
                span(left_s),
                note,
            )


@contextlib.contextmanager
def meter(label: str, total: int, done: int = 0, tell: Tell | None = None) -> Iterator[Meter]:
    """Show progress while the context lasts."""
    with bars() as bar:
        yield Meter(label, total, done, bar, tell)


class _Display:
    """What is on the terminal: one live display for all bars, since two would overwrite each other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.progress: Progress | None = None


_display = _Display()


@contextlib.contextmanager
def bars() -> Iterator[Progress | None]:
    """The bars of this process, to add one's own to (with a field ``figures``); None where output is a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with _display.lock:
        _display.users += 1
        if _display.progress is None:
            _display.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            _display.progress.start()
        progress = _display.progress
    try:
        yield progress
    finally:
        with _display.lock:
            _display.users -= 1
            if not _display.users:
                progress.stop()
                _display.progress = None


def span(seconds: float) -> str:
    """A length of time for people."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
