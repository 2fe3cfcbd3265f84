"""SIGTERM: the polite request to stop, at once where nothing is lost by it, else at the next safe point."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
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


def ask_to_stop(request: Path) -> None:
    """Leave the file ``request`` for whoever works in a block of :func:`stops_through`; again changes nothing.

    Raises:
        OSError: there is no such block, or the file system does not answer.
    """
    if not request.exists():
        _reserved(request).rename(request)


@contextmanager
def stops_through(request: Path) -> Iterator[None]:
    """While the block runs, SIGTERM only leaves the file ``request``, which whoever does the work looks for.

    A second SIGTERM stops at once, as does one that cannot be passed on. A request nobody came to is honoured at the
    end of the block.

    Raises:
        Terminated: SIGTERM came.
    """
    reserved = _reserved(request)
    reserved.touch()  # a disk may be full just when it is time to stop, and a new name needs no room
    request.unlink(missing_ok=True)  # of an earlier process

    def ask(number: int, frame: FrameType | None) -> None:
        logger.info("stopping after this step; once more to stop at once")
        signal.signal(signal.SIGTERM, stop_at_once)
        try:
            ask_to_stop(request)
        except OSError as error:
            logger.warning("nobody can be asked to stop after this step, so it is now: %s", error)
            stop_at_once(number, frame)

    try:
        with _handled_by(ask):
            yield
    finally:
        with contextlib.suppress(OSError):
            reserved.unlink(missing_ok=True)
    if request.exists():
        raise Terminated


def _reserved(request: Path) -> Path:
    return request.with_name(f".{request.name}")


@contextmanager
def _handled_by(ask: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let ``ask`` handle SIGTERM in the main thread; only that one can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupt = signal.signal(signal.SIGTERM, ask), signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves one of its own that waits for a trainer long gone
