"""Follow mode: training on a round while collectors still write it, ending when the round is sealed.

There is no global order yet, so shards are read in the order they are noticed, and that order is recorded in the round
(``order-<name>/000000.json``, ...), entry after entry, before anybody reads by it. Every rank, and every resumed run,
reads by the record; of a prompt committed twice the first one counts. Do not compact a round that is still followed:
the record names shards.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from trajectory_store.errors import CorruptShardError, InvalidNameError, MissingShardError, StoreError
from trajectory_store.order import balanced_shares
from trajectory_store.schema import SUMMARY_COLUMNS, RowBatch
from trajectory_store.shard import ShardFile
from trajectory_store.store import Round
from trajectory_store.trajectory import Trajectory

KEPT_BATCHES = 8
"""Decoded record batches kept; rows are read nearly in the order they lie in."""


@dataclass(frozen=True)
class FollowPosition:
    """How far a follower has got, the same on every rank."""

    name: str
    consumed: int
    """Rows of the recorded order that were handed out, to all ranks together."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FollowPosition:
        return cls(str(values["name"]), int(values["consumed"]))


@dataclass(frozen=True)
class FollowStep:
    """One step's samples for one rank."""

    trajectories: tuple[Trajectory, ...]
    position: FollowPosition
    """Where to resume once this step is done."""


class _Place(NamedTuple):
    shard: str
    batch: int
    row: int
    tokens: int


class RoundFollower:
    """Iterates over steps of a round that is being written, for one rank."""

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
    ) -> None:
        """Nothing is read before iteration.

        Args:
            samples: rows in a step, over all ranks; the last step has what is left.
            name: names the recorded order; followers of the same name read the same sequence.
            rank: rank 0 records the order, the others wait for the record.
            poll_s: time between looks for new shards.
            timeout_s: give up when nothing new came for so long; None waits for ever.

        Raises:
            StoreError: `position` is of another recorded order.
        """
        if not 0 <= rank < world_size or samples < 1:
            raise ValueError(f"need 0 <= rank < world_size and samples > 0, got {rank}, {world_size}, {samples}")
        if not name.isidentifier():
            raise InvalidNameError(f"name {name!r} must be letters, digits and '_'")
        if position is not None and position.name != name:
            raise StoreError(f"the saved position is of the order {position.name!r}, not {name!r}")
        self._round = round_
        self._record = round_.folder.child(f"order-{name}")
        self._name, self._samples = name, samples
        self._rank, self._world_size = rank, world_size
        self._consumed = position.consumed if position else 0
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self._batches: OrderedDict[tuple[str, int], RowBatch] = OrderedDict()

    def __iter__(self) -> Iterator[FollowStep]:
        """Steps until the round is sealed and all of it was read.

        Raises:
            CorruptShardError: a shard is damaged.
            StoreError: nothing new came within the timeout.
        """
        consumed = 0
        step: list[_Place] = []
        for place in self._places():
            consumed += 1
            if consumed > self._consumed:
                step.append(place)
            if len(step) == self._samples:
                yield self._step(step, consumed)
                step = []
        if step:
            yield self._step(step, consumed)

    def _step(self, places: list[_Place], consumed: int) -> FollowStep:
        lengths = np.array([max(1, place.tokens) for place in places])
        share = balanced_shares(lengths, self._world_size)[self._rank]
        rows = tuple(self._row(places[i]) for i in share.tolist())
        return FollowStep(rows, FollowPosition(self._name, consumed))

    def _row(self, place: _Place) -> Trajectory:
        key = (place.shard, place.batch)
        if key not in self._batches:
            self._batches[key] = RowBatch(ShardFile(self._round.folder, place.shard).read_batch(place.batch))
            if len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        return self._batches[key][place.row]

    def _places(self) -> Iterator[_Place]:
        """Every row that counts, in recorded order."""
        seen: set[str] = set()
        for shard in self._shards():
            try:
                file = ShardFile(self._round.folder, shard, SUMMARY_COLUMNS)
            except MissingShardError:
                if self._round.is_sealed and shard not in {entry.name for entry in self._round.manifest.shards}:
                    continue  # it came too late for the seal and was withdrawn by its writer
                raise
            for number in range(file.batches):
                batch = file.read_batch(number)
                tokens = batch["prompt_tokens"].to_numpy() + batch["response_tokens"].to_numpy()
                for row, prompt_id in enumerate(batch["prompt_id"].to_pylist()):
                    if prompt_id not in seen:
                        seen.add(prompt_id)
                        yield _Place(shard, number, row, int(tokens[row]))

    def _shards(self) -> Iterator[str]:
        """Names of shards in recorded order, recording it if this is rank 0; ends with the record."""
        known: set[str] = set()
        entry = 0
        heard = time.monotonic()
        while True:
            shards = self._read_entry(entry)
            if shards is None and self._rank == 0:
                shards = self._extend(entry, known)
            if shards is not None:
                if not shards:  # the entry that ends the record
                    return
                entry += 1
                known.update(shards)
                heard = time.monotonic()
                yield from shards
                continue
            if self._timeout_s is not None and time.monotonic() - heard > self._timeout_s:
                raise StoreError(
                    f"{self._round.folder.path}: nothing new for {self._timeout_s:g} s and the round is not sealed; "
                    "are the collectors still running?"
                )
            time.sleep(self._poll_s)

    def _extend(self, entry: int, known: set[str]) -> list[str] | None:
        """Record the shards that appeared, or the end once the round is sealed; None when there is nothing to say."""
        sealed = self._round.is_sealed  # asked before looking at the shards: what is seen afterwards is complete
        names = [s.name for s in self._round.manifest.shards] if sealed else self._round.shard_names()
        new = sorted(set(names) - known)
        if not new and not sealed:
            return None
        self._record.create(_entry_name(entry), json.dumps(new).encode())
        return self._read_entry(entry)

    def _read_entry(self, entry: int) -> list[str] | None:
        name = _entry_name(entry)
        if not self._record.exists(name):
            return None
        try:
            return [str(shard) for shard in json.loads(bytes(self._record.read(name)))]
        except ValueError as error:
            raise CorruptShardError(f"{self._record.path_of(name)} is damaged: {error}") from error


def _entry_name(entry: int) -> str:
    return f"{entry:06d}.json"
