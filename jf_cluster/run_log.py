"""The run's log: what the driver says, also kept in ``log.txt`` of the run's directory, where ``status`` finds it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trajectory_store import without_secrets

FILE = "log.txt"
_LINE = re.compile(r"(?P<time>\S+ \S+) (?P<level>WARNING|ERROR|CRITICAL) (?P<text>.*)")
_TAIL_BYTES = 64 * 1024


@contextmanager
def kept_log(run_dir: Path) -> Iterator[None]:
    """Append the project's messages to the run's log while the block lasts, one line each."""
    handler = _Quiet(run_dir / FILE)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    loggers = [logging.getLogger(name) for name in ("jf_cluster", "trajectory_store")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        # Told on the terminal by whoever catches it; here only for the file.
        text = without_secrets(f"{type(error).__name__}: {error}")
        handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None))
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def last_troubles(run_dir: Path, count: int) -> list[str]:
    """The last warnings and errors of the log, oldest first; only its last 64 KiB are read."""
    path = run_dir / FILE
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    return [line for line in lines if _LINE.fullmatch(line)][-count:]


class _Quiet(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out: on a full disk, logging's own tracebacks would bury what the terminal is told."""


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ⏎ ".join(line for line in super().format(record).splitlines() if line.strip())
