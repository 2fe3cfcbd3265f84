"""The log of steps: one JSON line per optimizer step, written by rank 0 and followed by the driver.

The file is how a rank, wherever it runs, tells the driver how far it is; it is also the record from which an
interrupted training is compared with an uninterrupted one. After a restart the lines past the checkpoint are cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, summed over all ranks; losses are means per token over the whole step."""

    step: int
    loss: float
    consistency: float
    ar: float
    agreement: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    fill: float
    seconds: float
    epoch: int
    consistency_by_ratio: tuple[float | None, ...] = ()
    """By noise ratio of the block, in equal steps from 0 to 1; None where a step had no such token."""
    peak_memory_bytes: int = 0
    """Of rank 0 since it started."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "consistency_by_ratio", tuple(self.consistency_by_ratio))  # JSON has lists only


class StepsLog:
    """The writing end; ``done`` steps stay, later lines are removed."""

    def __init__(self, path: Path, done: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_steps(path) if record.step <= done] if path.exists() else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(asdict(record)) + "\n" for record in kept))
        partial.rename(path)  # a new file: who follows the old one sees that it was replaced
        self._stream = path.open("a")

    def append(self, record: StepRecord) -> None:
        self._stream.write(json.dumps(asdict(record)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_steps(path: Path) -> list[StepRecord]:
    """All whole lines of a log."""
    return list(StepsFollower(path).new_records())


class StepsFollower:
    """The reading end: gives records as they appear, and starts over when the file is replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._file = path.stat().st_ino if path.exists() else 0
        self.starts = 0
        """How often ranks have started since."""

    def new_records(self) -> Iterator[StepRecord]:
        """Records appended since the last call; after a restart of the ranks, those they kept once more."""
        try:
            with self._path.open("rb") as stream:
                file = os.fstat(stream.fileno()).st_ino
                if file != self._file:
                    self._file, self._offset = file, 0
                    self.starts += 1
                stream.seek(self._offset)
                # A line being written, or cut by a kill, has no end yet.
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        if not newline:
            return
        self._offset += len(whole) + 1
        for line in whole.splitlines():
            yield StepRecord(**json.loads(line))
