"""The columns of a shard: their Arrow types, their versions, and the way between rows and record batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trajectory_store.provenance import Provenance
from trajectory_store.trajectory import Trajectory, digest

INT32 = pa.int32()

SCHEMA_VERSION = 1
READABLE_BY = 1
"""Oldest store version that can read what this one writes; raised only when old readers would misread."""

SUMMARY_COLUMNS = ("prompt_id", "digest", "prompt_tokens", "response_tokens", "iteration_count")
"""Small columns that say what a shard holds without decoding its tokens."""
LIST_COLUMNS = ("prompt", "response", "iterations", "accepted", "tails")
TOKEN_COLUMNS = ("prompt", "response", "tails")
ROW_COLUMNS = ("prompt_id", "finished", *LIST_COLUMNS)
"""What a trajectory is made of."""
COLUMNS = (*SUMMARY_COLUMNS, "finished", *LIST_COLUMNS)

VERSION_KEY = b"trajectory_store.version"
READABLE_KEY = b"trajectory_store.readable_by"
PROVENANCE_KEY = b"trajectory_store.provenance"


def token_type(vocabulary_size: int | None) -> pa.DataType:
    """The narrowest type for token ids: 16 bits where the vocabulary allows, which reads faster and stores smaller."""
    return pa.uint16() if vocabulary_size is not None and vocabulary_size <= 1 << 16 else pa.int32()


def schema(provenance: Provenance, tokens: pa.DataType = INT32) -> pa.Schema:
    """The Arrow schema of a shard, provenance in its metadata; `tokens` is the type of token ids."""
    types = {name: tokens if name in TOKEN_COLUMNS else INT32 for name in LIST_COLUMNS}
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("digest", pa.binary(), nullable=False),
            pa.field("prompt_tokens", pa.int32(), nullable=False),
            pa.field("response_tokens", pa.int32(), nullable=False),
            pa.field("iteration_count", pa.int32(), nullable=False),
            pa.field("finished", pa.bool_(), nullable=False),
            *(pa.field(name, _list_of(types[name]), nullable=False) for name in LIST_COLUMNS),
        ],
        metadata={
            VERSION_KEY: str(SCHEMA_VERSION),
            READABLE_KEY: str(READABLE_BY),
            PROVENANCE_KEY: provenance.to_json(),
        },
    )


def _list_of(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False))


def record_batch(rows: Sequence[Trajectory], iteration_counts: Sequence[int], columns: pa.Schema) -> pa.RecordBatch:
    """Normalised rows as Arrow columns.

    Args:
        iteration_counts: iterations the row's blocks needed together; more than it stores when it was thinned.
    """

    def ragged(name: str) -> pa.Array:
        arrays = [getattr(row, name) for row in rows]
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        list_type = columns.field(name).type
        # Integers have the same names in Arrow and NumPy; Arrow's own way to the one from the other imports pandas.
        values = np.concatenate(arrays).astype(str(list_type.value_type), copy=False)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=list_type)

    return pa.record_batch(
        [
            pa.array([row.prompt_id for row in rows], pa.string()),
            pa.array([digest(row) for row in rows], pa.binary()),
            pa.array([len(row.prompt) for row in rows], pa.int32()),
            pa.array([len(row.response) for row in rows], pa.int32()),
            pa.array(iteration_counts, pa.int32()),
            pa.array([row.finished for row in rows], pa.bool_()),
            *(ragged(name) for name in LIST_COLUMNS),
        ],
        schema=columns,
    )


class RowBatch:
    """A decoded record batch as numpy views, from which trajectories are cut without copying."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.rows = batch.num_rows
        self._ids = batch.column("prompt_id").to_pylist()
        self._finished = batch.column("finished").to_pylist()
        parts = []
        for name in LIST_COLUMNS:
            column = batch.column(name)
            offsets = column.offsets.to_numpy().tolist()
            values = column.values.to_numpy().astype(np.int32, copy=False)
            values.flags.writeable = False  # Arrow's memory is so already, a copy of 16-bit tokens is not
            parts.append((values, list(map(slice, offsets, offsets[1:]))))
        # In memory, where tokens that are stored in 16 bits take 32.
        self.nbytes = sum(values.nbytes for values, _ in parts)
        (self._prompt, self._prompts), (self._response, self._responses), *rest = parts
        (self._iterations, self._steps), (self._accepted, self._prefixes), (self._tails, self._ends) = rest

    def __getitem__(self, row: int) -> Trajectory:
        return Trajectory(
            self._ids[row],
            self._prompt[self._prompts[row]],
            self._response[self._responses[row]],
            self._finished[row],
            self._iterations[self._steps[row]],
            self._accepted[self._prefixes[row]],
            self._tails[self._ends[row]],
        )
