"""Follow mode: training on a round while collectors still write it, ending when the round is sealed.

There is no global order yet, so rows are read in the order they are noticed, which rank 0 records before anybody reads
by it (commit_order). Every rank, and every resumed run, reads by the record, and reads ahead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from trajectory_store.commit_order import CommitOrder
from trajectory_store.errors import MissingShardError, StoreError
from trajectory_store.order import balanced_shares
from trajectory_store.placed import Place, PlacedRows
from trajectory_store.prefetch import ReadingAhead
from trajectory_store.reader import TrajectoryReader
from trajectory_store.store import Round
from trajectory_store.trajectory import Trajectory


@dataclass(frozen=True)
class FollowPosition:
    """How far a follower has got, the same on every rank."""

    name: str
    consumed: int
    """Rows of the recorded order that were handed out, to all ranks together."""
    last_prompt_id: str
    """The last of them: tells this record from another of the same name."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FollowPosition:
        return cls(str(values["name"]), int(values["consumed"]), str(values["last_prompt_id"]))


@dataclass(frozen=True)
class FollowStep:
    """One step's samples for one rank."""

    trajectories: tuple[Trajectory, ...]
    position: FollowPosition
    """Where to resume once this step is done."""


class RoundFollower(ReadingAhead[FollowStep]):
    """Iterates over steps of a round that is being written, for one rank, until it is sealed and all of it was read."""

    def __init__(
        self,
        round_: Round,
        *,
        samples: int,
        name: str = "trainer",
        rank: int = 0,
        world_size: int = 1,
        position: FollowPosition | None = None,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        """Nothing is read before iteration.

        Args:
            samples: rows in a step, over all ranks; the last step has what is left.
            name: names the recorded order; followers of the same name read the same sequence.
            rank: rank 0 records the order, the others wait for the record.
            poll_s: time between looks for new shards.
            timeout_s: give up when nothing new came for so long; None waits for ever.
            prefetch_steps: steps read ahead, as far as they have been written.

        Raises:
            StoreError: `position` is of another recorded order.
        """
        super().__init__(prefetch_steps, threads=1)
        if not 0 <= rank < world_size or samples < 1:
            raise ValueError(f"need 0 <= rank < world_size and samples > 0, got {rank}, {world_size}, {samples}")
        if position is not None and position.name != name:
            raise StoreError(f"the saved position is of the order {position.name!r}, not {name!r}")
        self._round = round_
        self._order = CommitOrder(round_, name)
        self._name, self._samples = name, samples
        self._rank, self._world_size = rank, world_size
        self._start = position or FollowPosition(name, 0, "")
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._placed = PlacedRows(round_)
        self._compacted: TrajectoryReader | None = None

    def _jobs(self, stop: threading.Event) -> Iterator[Callable[[], FollowStep]]:
        consumed = 0
        step: list[Place] = []
        for place in self._places(stop):
            consumed += 1
            if consumed == self._start.consumed and place.prompt_id != self._start.last_prompt_id:
                raise self._refused(f"its row {consumed} is {place.prompt_id!r}")
            if consumed > self._start.consumed:
                step.append(place)
            if len(step) == self._samples:
                yield self._job(step, consumed)
                step = []
        if stop.is_set():
            return
        if consumed < self._start.consumed:
            raise self._refused(f"it has {consumed} rows")
        if step:
            yield self._job(step, consumed)

    def _refused(self, why: str) -> StoreError:
        return StoreError(
            f"the saved position is after {self._start.consumed} rows, the last being {self._start.last_prompt_id!r}, "
            f"but the order {self._name!r} of {self._round.folder.path} is another one: {why}"
        )

    def _job(self, places: list[Place], consumed: int) -> Callable[[], FollowStep]:
        lengths = np.array([max(1, place.tokens) for place in places])
        share = balanced_shares(lengths, self._world_size)[self._rank]
        position = FollowPosition(self._name, consumed, places[-1].prompt_id)
        return partial(self._read, [places[i] for i in share.tolist()], position)

    def _read(self, places: list[Place], position: FollowPosition) -> FollowStep:
        return FollowStep(tuple(self._row(place).copy() for place in places), position)

    def _row(self, place: Place) -> Trajectory:
        try:
            return self._placed.read(place.shard, place.batch, place.row)
        except MissingShardError:
            return self._moved(place)

    def _moved(self, place: Place) -> Trajectory:
        """A row of a shard that is gone: compacted, once the round was sealed."""
        if self._compacted is None and self._round.is_sealed:
            self._compacted = self._round.reader()
        row = self._compacted.find(place.prompt_id) if self._compacted is not None else None
        if row is None:
            raise MissingShardError(
                f"{self._round.folder.path_of(place.shard)} is gone, and with it {place.prompt_id!r}, which the order "
                f"{self._name!r} names"
            )
        return row

    def _places(self, stop: threading.Event) -> Iterator[Place]:
        """Every row in recorded order, recording it if this is rank 0; ends with the record."""
        seen: set[str] = set()
        entry = 0
        heard = time.monotonic()
        while not stop.is_set():
            places = self._order.entry(entry)
            if places is None:
                if self._rank == 0 and self._order.record(entry, seen):
                    continue
                if self._timeout_s is not None and time.monotonic() - heard > self._timeout_s:
                    raise StoreError(
                        f"{self._round.folder.path}: nothing new for {self._timeout_s:g} s and the round is not "
                        "sealed; are the collectors still running?"
                    )
                stop.wait(self._poll_s)
                continue
            if not places:
                return
            entry += 1
            if self._rank == 0:
                seen.update(place.prompt_id for place in places)
            yield from places
            heard = time.monotonic()
