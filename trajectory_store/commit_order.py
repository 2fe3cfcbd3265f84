"""The order in which the rows of a round that is still being written are read: noticed once, recorded, then a fact.

``order-<name>/000000.arrow``, ``000001.arrow``, ...: each entry names rows by prompt id and says where they lay when
they were noticed; an entry without rows ends the record. A row that lies elsewhere by now (the round was compacted) is
found by its prompt id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from trajectory_store.checksums import column_checksums, damaged_column
from trajectory_store.errors import CorruptShardError, InvalidNameError, MissingShardError
from trajectory_store.manifest import RowIndex
from trajectory_store.placed import Place, rows_of
from trajectory_store.store import Round

ENTRY_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)
SEALED_ENTRY_ROWS = 1 << 16
"""Most rows in an entry made from a sealed round's index, which may list millions."""


class CommitOrder:
    """A recorded order of a round. Of a prompt committed twice the row noticed first counts."""

    def __init__(self, round_: Round, name: str) -> None:
        if not name.isidentifier():
            raise InvalidNameError(f"name {name!r} must be letters, digits and '_'")
        self._round = round_
        self._folder = round_.folder.child(f"order-{name}")
        self._looked_at: set[str] = set()

    def entry(self, number: int) -> list[Place] | None:
        """An entry's rows; none for the one that ends the record. None when there is no such entry yet.

        Raises:
            CorruptShardError: the entry is damaged.
        """
        name = _entry_name(number)
        where = self._folder.path_of(name)
        if not self._folder.exists(name):
            return None
        try:
            content = pa.py_buffer(bytes(self._folder.read(name)))
            read = ipc.open_file(content).get_batch_with_custom_metadata(0)
            if damaged := damaged_column(read.batch, read.custom_metadata, _entry_name(number), 0):
                raise CorruptShardError(f"{where} is damaged: its column {damaged} is not what was recorded")
            return [Place(*row) for row in zip(*(column.to_pylist() for column in read.batch.columns), strict=True)]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptShardError(f"{where} is damaged: {error}") from error

    def record(self, number: int, seen: set[str]) -> bool:
        """Record what has been committed besides the prompts in `seen` as an entry; False when there is nothing to say.

        Whoever records an entry first decides it.

        Raises:
            CorruptShardError: a new shard is damaged.
        """
        stage = self._round.stage
        if stage == "sealed":
            places = self._sealed_rows(seen)
        else:
            # A shard noticed while somebody seals may still be withdrawn by its writer as too late: wait and see.
            places = self._new_rows(seen)
            if not places or self._round.stage != "open":
                return False
            self._looked_at.update(place.shard for place in places)
        self._folder.create(_entry_name(number), _encoded(places, number))
        return True

    def _new_rows(self, seen: set[str]) -> list[Place]:
        """Rows of shards that were not looked at before."""
        places: dict[str, Place] = {}
        for shard in self._round.shard_names():
            if shard in self._looked_at:
                continue
            try:
                rows = list(rows_of(self._round, shard))
            except MissingShardError:  # withdrawn, or compacted since the round was looked at
                continue
            for place in rows:
                if place.prompt_id not in seen:
                    places.setdefault(place.prompt_id, place)
            if all(place.prompt_id in seen for place in rows):
                self._looked_at.add(shard)
        return list(places.values())

    def _sealed_rows(self, seen: set[str]) -> list[Place]:
        """Rows of the sealed round, in the order they are stored in, so that they are read fast."""
        reader = self._round.reader()
        index: RowIndex = reader.index
        shards = [entry.name for entry in reader.manifest.shards]
        tokens = index.prompt_lengths.astype(np.int64) + index.response_lengths
        ids = index.table["prompt_id"].to_pylist()
        order = np.lexsort((index.rows, index.batches, index.shards)).tolist()
        unseen = (i for i in order if ids[i] not in seen)
        return [
            Place(ids[i], int(tokens[i]), shards[index.shards[i]], int(index.batches[i]), int(index.rows[i]))
            for i, _ in zip(unseen, range(SEALED_ENTRY_ROWS), strict=False)
        ]


def _encoded(places: Sequence[Place], number: int) -> pa.Buffer:
    columns = zip(*places, strict=True) if places else [[] for _ in ENTRY_SCHEMA]
    arrays = [pa.array(list(c), field.type) for c, field in zip(columns, ENTRY_SCHEMA, strict=True)]
    batch = pa.record_batch(arrays, schema=ENTRY_SCHEMA)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, ENTRY_SCHEMA, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch, custom_metadata=column_checksums(batch, _entry_name(number), 0))
    return sink.getvalue()


def _entry_name(number: int) -> str:
    return f"{number:06d}.arrow"
