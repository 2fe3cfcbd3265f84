"""Rows found by where they lie in published shards, before a manifest lists them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from trajectory_store.schema import SUMMARY_COLUMNS, RowBatch
from trajectory_store.shard import ShardFile
from trajectory_store.store import Round
from trajectory_store.trajectory import Trajectory

KEPT_BATCHES = 8
"""Decoded record batches kept; rows are read nearly in the order they lie in."""


class Place(NamedTuple):
    """A row and where it lies."""

    prompt_id: str
    tokens: int
    """Prompt and response tokens."""
    shard: str
    batch: int
    row: int


def rows_of(round_: Round, shard: str) -> Iterator[Place]:
    """Every row of a published shard.

    Raises:
        CorruptShardError: the shard is damaged.
        MissingShardError: there is no such shard: withdrawn, or compacted since the round was looked at.
    """
    file = ShardFile(round_.folder, shard, SUMMARY_COLUMNS)
    for number in range(file.batches):
        batch = file.read_batch(number)
        tokens = (batch["prompt_tokens"].to_numpy().astype(np.int64) + batch["response_tokens"].to_numpy()).tolist()
        for row, prompt_id in enumerate(batch["prompt_id"].to_pylist()):
            yield Place(prompt_id, tokens[row], shard, number, row)


class PlacedRows:
    """Reads rows by their place and keeps the record batches that were decoded last; for one thread."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._batches: OrderedDict[tuple[str, int], RowBatch] = OrderedDict()

    def read(self, shard: str, batch: int, row: int) -> Trajectory:
        """The trajectory at a place.

        Raises:
            CorruptShardError: the shard is damaged.
            MissingShardError: it is gone.
        """
        key = (shard, batch)
        if key not in self._batches:
            self._batches[key] = RowBatch(ShardFile(self._round.folder, shard).read_batch(batch))
            if len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key][row]
