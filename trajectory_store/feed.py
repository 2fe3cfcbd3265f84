"""Feeding trainers: one global order, shared out to any number of ranks, read ahead, resumed exactly.

The order of samples and where a step ends are functions of the sealed round, the seed and the epoch. The world size
only decides who takes which rows of a step, so a run may stop on eight ranks and go on with three, in mid-epoch, and
every step still trains on the same rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from trajectory_store.errors import StoreError
from trajectory_store.order import Rows, balanced_shares, global_order, step_bounds
from trajectory_store.prefetch import ReadingAhead
from trajectory_store.reader import TrajectoryReader
from trajectory_store.trajectory import Trajectory


@dataclass(frozen=True)
class Position:
    """How far a feed has got: all that a checkpoint needs to keep, the same on every rank."""

    content_hash: str
    """The round being read; resuming on another is refused."""
    seed: int
    epoch: int
    consumed: int
    """Rows of this epoch's order that were handed out, to all ranks together."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Position:
        return cls(str(values["content_hash"]), int(values["seed"]), int(values["epoch"]), int(values["consumed"]))


@dataclass(frozen=True)
class FeedStep:
    """One step's samples for one rank."""

    trajectories: tuple[Trajectory, ...]
    rows: Rows
    """Row numbers of `trajectories` in the round, int64 [n]."""
    position: Position
    """Where to resume once this step is done."""


class TrajectoryFeed(ReadingAhead[FeedStep]):
    """Iterates over steps for one rank, reading ahead in background threads.

    Every rank makes one with the same arguments apart from `rank`, and gets as many steps as the others.
    """

    def __init__(
        self,
        reader: TrajectoryReader,
        *,
        seed: int,
        samples: int | None = None,
        tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = 1,
        drop_last: bool = False,
        position: Position | None = None,
        prefetch_steps: int = 2,
        threads: int = 1,
    ) -> None:
        """Plan the feed; reading starts with iteration.

        Args:
            samples: rows in a step, over all ranks.
            tokens: most prompt and response tokens in a step, over all ranks.
            epochs: when to stop, counted from epoch 0; None for never.
            drop_last: leave out a last step of an epoch with fewer than `samples` rows.
            position: where to resume, from a FeedStep of any rank of any world size.
            prefetch_steps: steps read ahead.
            threads: threads that read; their number changes nothing but speed.

        Raises:
            StoreError: `position` is of another round or another seed.
        """
        super().__init__(prefetch_steps, threads)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        start = Position(reader.manifest.content_hash, seed, 0, 0)
        if position is not None and (position.content_hash, position.seed) != (start.content_hash, seed):
            raise StoreError(
                f"the saved position is of round {position.content_hash[:12]} with seed {position.seed}; this is round "
                f"{start.content_hash[:12]} with seed {seed}"
            )
        self._reader = reader
        self._samples, self._tokens = samples, tokens
        self._rank, self._world_size = rank, world_size
        self._epochs, self._drop_last = epochs, drop_last
        self._start = position or start

    def _jobs(self, stop: threading.Event) -> Iterator[Callable[[], FeedStep]]:
        return (partial(self._read, rows, position) for rows, position in self._plan())

    def _read(self, rows: Rows, position: Position) -> FeedStep:
        return FeedStep(tuple(self._reader[row].copy() for row in rows.tolist()), rows, position)

    def _plan(self) -> Iterator[tuple[Rows, Position]]:
        """This rank's rows of every step, with the position after it."""
        lengths = self._reader.prompt_lengths.astype(np.int64) + self._reader.response_lengths
        count = len(lengths)
        epoch, consumed = self._start.epoch, self._start.consumed
        if self._drop_last and self._samples is not None and count < self._samples:
            return
        while count and (self._epochs is None or epoch < self._epochs):
            order = global_order(count, self._start.seed, epoch)
            for first, stop in step_bounds(lengths[order], samples=self._samples, tokens=self._tokens, start=consumed):
                if self._drop_last and stop == count and self._samples and stop - first < self._samples:
                    break
                rows = order[first:stop]
                share = balanced_shares(np.maximum(lengths[rows], 1), self._world_size)[self._rank]
                after = (epoch, stop) if stop < count else (epoch + 1, 0)
                yield rows[share], Position(self._start.content_hash, self._start.seed, *after)
            epoch, consumed = epoch + 1, 0
