"""The rows of a round numbered among all its prompts, whether it is sealed or still being written.

A prompt's number is its place in the order of prompt ids, prompts given up on included. So the numbers, and whatever
order is made of them, are the same for who reads the sealed round and for who follows it while it is written.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trajectory_store.errors import MissingShardError, StoreError
from trajectory_store.placed import PlacedRows, rows_of
from trajectory_store.provenance import Provenance
from trajectory_store.store import Round
from trajectory_store.trajectory import Trajectory

Numbers = npt.NDArray[np.int64]

_DIGESTED_AT_ONCE = 65_536


class SealedRows:
    """Rows of a sealed round by their number among all its prompts."""

    def __init__(self, round_: Round) -> None:
        """Open the round.

        Raises:
            RoundNotSealedError: it is not sealed.
            CorruptShardError: manifest, index or a reject is damaged.
        """
        self.reader = round_.reader()
        index = self.reader.index
        given_up = sorted(prompt_id for prompt_id in round_.rejects() if index.find(prompt_id) is None)
        places = [bisect_left(range(len(index)), prompt_id, key=index.prompt_id) for prompt_id in given_up]
        self._given_up = given_up
        self._rejected: Numbers = np.array(places, np.int64) + np.arange(len(places))

    def __len__(self) -> int:
        return len(self.reader) + len(self._rejected)

    def present(self, rows: Numbers) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` have a trajectory, bool [R]."""
        return ~np.isin(rows, self._rejected)

    def __getitem__(self, row: int) -> Trajectory:
        """The trajectory of a row that is present.

        Raises:
            StoreError: it is of a prompt that was given up on.
        """
        before = int(np.searchsorted(self._rejected, row))
        if before < len(self._rejected) and self._rejected[before] == row:
            raise StoreError(
                f"{self.reader.where}: {self._given_up[before]!r}, row {row}, was given up on: no trajectory"
            )
        return self.reader[row - before]

    @property
    def provenance(self) -> Provenance:
        """What the rows have in common."""
        return self.reader.manifest.provenance

    def provenance_of(self, row: int) -> Provenance:
        """The origin of a row."""
        return self.provenance

    def give_up(self) -> None:
        """Nobody waits for a sealed round."""

    def prompts_digest(self) -> str:
        """SHA-256 over the ids of all prompts; see :func:`digest_of`."""
        index = self.reader.index
        return _digest_of_sorted(heapq.merge(self._given_up, map(index.prompt_id, range(len(index)))))


class ArrivingRows:
    """Rows of a round that is being written, by the same numbers; waits for those it is asked for.

    For one thread, but for :meth:`give_up`. Once the round is sealed it reads by the manifest like everybody else.
    """

    def __init__(
        self,
        round_: Round,
        prompt_ids: Iterable[str] | pa.Array,
        *,
        poll_s: float = 1.0,
    ) -> None:
        """Nothing is read before rows are asked for.

        Args:
            prompt_ids: of all prompts of the round, in any order; each will be committed or rejected. An array that
                is in order already is used as it is, so it may lie in a file mapped into memory.
            poll_s: time between looks for new shards, up to ten times as much when nothing came for long.
        """
        self._round, self._poll_s, self._given_up = round_, poll_s, threading.Event()
        self._ids = sorted_ids(prompt_ids)
        self._settled = np.zeros(len(self._ids), bool)
        self._shard = np.full(len(self._ids), -1, np.int32)
        self._batch, self._row = np.zeros_like(self._shard), np.zeros_like(self._shard)
        self._shards: list[str] = []
        self._seen: set[str] = set()
        """The same, to look them up."""
        self._rejected: set[str] = set()
        """Prompts known to be given up on."""
        self._placed = PlacedRows(round_)
        self._sealed: SealedRows | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def present(self, rows: Numbers) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` have a trajectory, bool [R]; returns when that is known of every one.

        Raises:
            StoreError: the round was sealed with other prompts than were announced, or is damaged.
            WaitInterruptedError: the wait was given up.
        """
        heard = time.monotonic()
        while self._sealed is None and not self._settled[rows].all():
            if self._look():
                heard = time.monotonic()
            elif self._given_up.wait(pause_s(self._poll_s, time.monotonic() - heard)):
                raise WaitInterruptedError(f"the wait for rows of {self._round.folder.path} was given up")
        return self._sealed.present(rows) if self._sealed is not None else self._shard[rows] >= 0

    def __getitem__(self, row: int) -> Trajectory:
        """The trajectory of a row that is known to be present."""
        if self._sealed is None:
            try:
                return self._placed.read(self._shards[self._shard[row]], int(self._batch[row]), int(self._row[row]))
            except MissingShardError:  # compacted, once it was sealed
                self._look()
                if self._sealed is None:
                    raise
        return self._sealed[row]

    def give_up(self) -> None:
        """End the wait of another thread, and every later one."""
        self._given_up.set()

    @cached_property
    def provenance(self) -> Provenance:
        """What the rows have in common; known as soon as one is present."""
        return self._round.provenance

    def provenance_of(self, row: int) -> Provenance:
        """The origin of a row that is known to be present."""
        return self.provenance

    def _look(self) -> bool:
        """Take notice of what is new; whether there was anything."""
        if self._round.is_sealed:
            self._sealed = SealedRows(self._round)
            if len(self._sealed) != len(self._ids) or self._sealed.prompts_digest() != digest_of(self._ids):
                raise StoreError(
                    f"{self._round.folder.path} was sealed with {len(self._sealed)} prompts, which are not the "
                    f"{len(self._ids)} it was to have: somebody else wrote to it"
                )
            return True
        news = False
        for shard in self._round.shard_names():
            if shard in self._seen:
                continue
            try:
                places = list(rows_of(self._round, shard))
            except MissingShardError:  # withdrawn
                continue
            self._seen.add(shard)
            self._shards.append(shard)
            for place in places:
                number = self._number(place.prompt_id)
                if number is not None and self._shard[number] < 0:
                    self._shard[number], self._batch[number], self._row[number] = (
                        len(self._shards) - 1,
                        place.batch,
                        place.row,
                    )
                    self._settled[number] = True
            news = True
        for prompt_id in self._round.rejects().keys() - self._rejected:
            self._rejected.add(prompt_id)
            if (number := self._number(prompt_id)) is not None and not self._settled[number]:
                self._settled[number] = news = True
        return news

    def _number(self, prompt_id: str) -> int | None:
        number = bisect_left(range(len(self._ids)), prompt_id, key=lambda place: self._ids[place].as_py())
        return number if number < len(self._ids) and self._ids[number].as_py() == prompt_id else None


class JoinedRows:
    """The rows of several rounds under one numbering, those of the first round first."""

    def __init__(self, parts: Sequence[SealedRows | ArrivingRows]) -> None:
        self._parts = parts
        self._begins: Numbers = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def present(self, rows: Numbers) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` have a trajectory, bool [R]; waits and raises as the rounds they are of do."""
        of = np.searchsorted(self._begins, rows, side="right") - 1
        found = np.zeros(len(rows), bool)
        for number in np.unique(of):
            found[of == number] = self._parts[number].present(rows[of == number] - self._begins[number])
        return found

    def __getitem__(self, row: int) -> Trajectory:
        """The trajectory of a row that is present."""
        part, row = self._place(row)
        return part[row]

    def provenance_of(self, row: int) -> Provenance:
        """The origin of a row that is present."""
        part, row = self._place(row)
        return part.provenance_of(row)

    def give_up(self) -> None:
        """End every wait, of another thread or later."""
        for part in self._parts:
            part.give_up()

    def _place(self, row: int) -> tuple[SealedRows | ArrivingRows, int]:
        number = int(np.searchsorted(self._begins, row, side="right")) - 1
        return self._parts[number], row - int(self._begins[number])


Rows = SealedRows | ArrivingRows | JoinedRows


def pause_s(poll_s: float, waited_s: float) -> float:
    """Time to the next look after nothing new was seen for ``waited_s``: a tenth of it, within limits.

    So a wait is longer by a tenth at most, and hundreds of readers do not list a folder of thousands of shards each
    second.
    """
    return min(max(poll_s, waited_s / 10), 10 * poll_s)


class WaitInterruptedError(StoreError):
    """A wait for rows that the waiting side gave up."""


def sorted_ids(prompt_ids: Iterable[str] | pa.Array) -> pa.LargeStringArray:
    """Distinct prompt ids in their order, which is that of their UTF-8 bytes; an array already so is given back."""
    ids = prompt_ids if isinstance(prompt_ids, pa.Array) else pa.array(prompt_ids, pa.large_string())
    ids = ids.cast(pa.large_string())
    if pc.all(pc.less(ids[:-1], ids[1:])).as_py():
        return ids
    distinct = pc.unique(ids)
    return distinct.take(pc.sort_indices(distinct))


def digest_of(prompt_ids: Iterable[str] | pa.Array) -> str:
    """SHA-256 over distinct prompt ids, hexadecimal, in whatever order they come."""
    ids = sorted_ids(prompt_ids)
    parts = (ids[begin : begin + _DIGESTED_AT_ONCE].to_pylist() for begin in range(0, len(ids), _DIGESTED_AT_ONCE))
    return _digest_of_sorted(itertools.chain.from_iterable(parts))


def _digest_of_sorted(prompt_ids: Iterable[str]) -> str:
    hasher = hashlib.sha256()
    for prompt_id in prompt_ids:
        hasher.update(f"{len(prompt_id.encode())}:{prompt_id}".encode())
    return hasher.hexdigest()
