"""Which samples each optimizer step consumes: a pure function of (sample lengths, seed, token budget).

The plan is one endless sequence of micro-batches. Epoch after epoch, rows are taken in the store's global order,
packed by token budget in windows of rows, and the micro-batches of a window are shuffled. Step ``s`` consumes
micro-batches ``[s·G, (s+1)·G)``, whatever the world size; a rank takes every ``world_size``-th of them. So a position
is one number, the step, and a run resumed on other ranks consumes the same samples. Reads nothing but lengths.

Rows may be left out from a step on. They are taken from the micro-batches they were packed into, and a micro-batch that
becomes empty from the sequence: what comes before that step stays as it was, and a checkpoint made there stays valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jf_cluster.jacobi.packing import pack
from trajectory_store import order_windows

Lengths = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the store that one forward pass takes together."""

    epoch: int
    rows: tuple[int, ...]


class TrainingPlan:
    """The sequence of micro-batches of a round.

    Args:
        count: N, rows of the round.
        lengths: called with an epoch and rows, int[R], gives their samples' tokens, int[R], 0 for rows without a
            sample; a pure function, asked for whole windows of rows, no more of them than the step that is drawn is
            likely to need, so it may wait for rows that are still being collected.
        seed: of the order; the same on every rank.
        token_budget: most tokens in one micro-batch; a longer sample has a micro-batch to itself.
        micro_batches_per_step: G, over all ranks.
        window: rows packed together; larger windows waste less and mix epochs' order more.
        left_out: pairs of a step and the rows that no micro-batch has from this step on.
    """

    def __init__(
        self,
        count: int,
        lengths: Lengths,
        seed: int,
        token_budget: int,
        micro_batches_per_step: int,
        window: int = 1024,
        left_out: Collection[tuple[int, Collection[int]]] = (),
    ) -> None:
        if count == 0:
            raise ValueError("a plan needs at least one sample")
        if len({row for _, rows in left_out for row in rows}) >= count:
            raise ValueError("a plan needs at least one sample that is not left out")
        self._left_out = left_out
        self._count, self._lengths = count, lengths
        self._seed, self._budget, self._per_step, self._window = seed, token_budget, micro_batches_per_step, window
        self._source = self._generate()
        self._drawn: list[MicroBatch] = []
        self._first = 0  # position of _drawn[0] in the sequence
        self._missing = 0  # micro-batches of the step that is being drawn

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """The G micro-batches of optimizer step ``step`` (from 0), in order. Cheap when called for rising steps."""
        begin, end = step * self._per_step, (step + 1) * self._per_step
        if begin < self._first:  # going back: the sequence is cheap to make again, and not worth keeping
            self._source, self._drawn, self._first = self._generate(), [], 0
        while (missing := end - self._first - len(self._drawn)) > 0:
            self._missing = missing
            self._drawn.append(next(self._source))
            excess = min(begin - self._first, len(self._drawn))
            if excess > 4 * self._window:
                del self._drawn[:excess]
                self._first += excess
        return tuple(self._drawn[begin - self._first : end - self._first])

    def share(self, step: int, rank: int, world_size: int) -> tuple[MicroBatch, ...]:
        """What ``rank`` forwards in optimizer step ``step``: G / world_size micro-batches.

        Raises:
            ValueError: G is not a multiple of the world size.
        """
        if self._per_step % world_size:
            raise ValueError(f"{self._per_step} micro-batches per step cannot be shared by {world_size} ranks")
        return self.step(step)[rank::world_size]

    def _generate(self) -> Iterator[MicroBatch]:
        """The whole sequence: what is packed, less what is left out at the position it would have."""
        position = 0
        for micro_batch in self._packed():
            step = position // self._per_step
            without = {row for since, rows in self._left_out if since <= step for row in rows}
            rows = tuple(row for row in micro_batch.rows if row not in without)
            if rows:
                yield MicroBatch(micro_batch.epoch, rows)
                position += 1

    def _packed(self) -> Iterator[MicroBatch]:
        count, epoch, of_window = self._count, 0, self._per_step
        never = {row for _, rows in self._left_out for row in rows}
        while True:
            found = False
            windows = enumerate(order_windows(count, self._seed, epoch, self._window))
            # Ranks share the work on the lengths (sharing.py): a step of many ranks must not take many exchanges.
            while some := list(itertools.islice(windows, max(1, self._missing // of_window))):
                ends = np.cumsum([len(rows) for _, rows in some])
                of_some = self._lengths(epoch, np.concatenate([rows for _, rows in some]))
                for (number, rows), lengths in zip(some, np.split(of_some, ends[:-1]), strict=True):
                    rows, lengths = rows[lengths > 0], lengths[lengths > 0]
                    found = found or not never.issuperset(rows.tolist())
                    packed = pack(lengths.tolist(), self._budget)
                    of_window = max(1, len(packed))
                    # Packing sorts by length; without a shuffle every window would run from long samples to short.
                    mixed = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch, number))))
                    for k in mixed.permutation(len(packed)):
                        yield MicroBatch(epoch, tuple(int(rows[i]) for i in packed[k]))
            if not found:
                raise ValueError("a plan needs at least one sample")
            epoch += 1
