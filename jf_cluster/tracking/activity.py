"""What a run is doing right now, in a small file for each stage at work: all that ``status`` needs beside the outputs.

A file is replaced in one step, at most once a second, so it may be read at any moment and costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from jf_cluster.whole_files import write_whole
from trajectory_store import without_secrets

logger = logging.getLogger(__name__)

FILE = "activity-{stage}.json"
WRITE_EVERY_S = 1.0

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Now:
    """A stage and how far it is; times are seconds since the epoch."""

    round: int
    stage: str
    state: State
    begun: float
    updated: float
    pid: int
    host: str
    unit: str = ""
    """What is counted."""
    done: int = 0
    total: int = 0
    per_second: float = 0.0
    figures: str = ""
    """What else the stage says of itself, in words."""
    error: str = ""

    @property
    def alive(self) -> bool:
        """Whether its process still runs; of a process on another machine that is taken for granted."""
        if self.state != "running":
            return False
        if self.host != socket.gethostname():
            return True
        try:
            return psutil.Process(self.pid).create_time() <= self.begun
        except psutil.NoSuchProcess:
            return False

    @property
    def left_s(self) -> float | None:
        """Seconds the rest takes at this rate; None where that is not known."""
        return (self.total - self.done) / self.per_second if self.per_second > 0 and self.total else None


class Activity:
    """The writing end, held by the stage."""

    def __init__(self, run_dir: Path, now: Now) -> None:
        self._path, self._now, self._written = run_dir / FILE.format(stage=now.stage), now, 0.0

    def progress(self, unit: str, done: int, total: int, per_second: float, figures: str = "") -> None:
        """Say how far the stage is."""
        self._now = replace(
            self._now, unit=unit, done=done, total=total, per_second=per_second, figures=figures, updated=time.time()
        )
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.write()

    def ended(self, state: State, error: str = "") -> None:
        """Say how the stage ended."""
        self._now = replace(self._now, state=state, error=error, updated=time.time())
        self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        try:
            write_whole(self._path, json.dumps(asdict(self._now)) + "\n")
        except OSError as error:  # what the work itself meets there is for the work to tell
            logger.debug("status is not up to date: %s", error)


@contextmanager
def working(run_dir: Path, round_number: int, stage: str) -> Iterator[Activity]:
    """Say that a stage runs, and in the end how it went."""
    for earlier in _recorded(run_dir):
        if not earlier.alive:  # ended, or killed and carried on from now
            # Stages of a pipelined round begin at the same time, and each clears up.
            (run_dir / FILE.format(stage=earlier.stage)).unlink(missing_ok=True)
    began = time.time()
    activity = Activity(
        run_dir, Now(round_number, stage, "running", began, began, pid=os.getpid(), host=socket.gethostname())
    )
    activity.write()
    try:
        yield activity
    except KeyboardInterrupt:
        activity.ended("interrupted")
        raise
    except BaseException as error:
        activity.ended("failed", without_secrets(f"{type(error).__name__}: {error}"))
        raise
    activity.ended("finished")


def read_activity(run_dir: Path) -> list[Now]:
    """The stages at work, several in pipelined rounds; where there are none the one that ended last, if any."""
    recorded = sorted(_recorded(run_dir), key=lambda now: now.updated)
    return [now for now in recorded if now.state == "running"] or recorded[-1:]


def _recorded(run_dir: Path) -> list[Now]:
    found = []
    for path in sorted(run_dir.glob(FILE.format(stage="*"))):
        with contextlib.suppress(FileNotFoundError):  # its stage has just been superseded
            found.append(Now(**json.loads(path.read_text())))
    return found
