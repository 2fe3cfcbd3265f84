"""SIGTERM: the polite request to stop, at once where nothing is lost by it, else at the next safe point."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """The process was asked to stop and has; what was done is kept and the same command carries on."""


_stopped = False  # no Event: its lock would stay taken where a second SIGTERM interrupts the handler of the first


def stop_at_once(_: int, __: FrameType | None) -> None:
    """Handle SIGTERM where every moment is a safe point: outputs appear in one atomic step."""
    global _stopped
    _stopped = True
    raise Terminated


def listen() -> None:
    """Have SIGTERM stop this process at once from now on."""
    global _stopped
    _stopped = False
    signal.signal(signal.SIGTERM, stop_at_once)


def raise_if_asked() -> None:
    """Stop now if SIGTERM came but what its handler raised was lost, as in a callback of the garbage collector.

    Raises:
        Terminated: so it was.
    """
    if _stopped and signal.getsignal(signal.SIGTERM) is stop_at_once:
        raise Terminated


def was_terminated(error: KeyboardInterrupt) -> bool:
    """Whether SIGTERM, not Ctrl-C, is behind it: Ray's waits turn what the handler raises into a plain interrupt."""
    return isinstance(error, Terminated) or _stopped


@contextmanager
def stops_through(request: Path) -> Iterator[None]:
    """While the block runs, SIGTERM only leaves the file ``request``, which whoever does the work looks for.

    A second SIGTERM stops at once. A request nobody came to is honoured at the end of the block.

    Raises:
        Terminated: SIGTERM came.
    """
    request.unlink(missing_ok=True)  # of an earlier process
    if threading.current_thread() is not threading.main_thread():  # only that one can handle signals
        yield
        return

    def ask(_: int, __: FrameType | None) -> None:
        logger.info("stopping after this step; once more to stop at once")
        signal.signal(signal.SIGTERM, stop_at_once)
        request.touch()

    before, interrupt = signal.signal(signal.SIGTERM, ask), signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves one of its own that waits for a trainer long gone
    if request.exists():
        raise Terminated
