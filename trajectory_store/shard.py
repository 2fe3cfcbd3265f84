"""One shard: an Arrow IPC file of trajectories, its schema, its name, its checksums.

A row is one prompt's response with all its trajectories. The file is an ordinary compressed Arrow IPC file (format
"file", so that record batches can be fetched one by one). On top of what Arrow knows, each record batch carries the
CRC-32 of every column as custom metadata, so a reader can verify exactly what it read, and the file name carries a
hash of the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from trajectory_store.errors import CorruptShardError, SchemaVersionError
from trajectory_store.folder import Folder
from trajectory_store.provenance import Provenance
from trajectory_store.trajectory import Trajectory, digest

SCHEMA_VERSION = 1
READABLE_BY = 1
"""Oldest store version that can read what this one writes; raised only when old readers would misread."""

Codec = Literal["zstd", "lz4", "none"]
DEFAULT_CODEC: Codec = "zstd"
"""By measurement (docs/store.md): a third smaller than LZ4, a quarter of uncompressed, read faster than trained on."""
ZSTD_LEVEL = 1

SUMMARY_COLUMNS = ("prompt_id", "digest", "prompt_tokens", "response_tokens", "iteration_count")
"""Small columns that say what a shard holds without decoding its tokens."""
LIST_COLUMNS = ("prompt", "response", "iterations", "accepted", "tails")
TOKEN_COLUMNS = ("prompt", "response", "tails")
ROW_COLUMNS = ("prompt_id", "finished", *LIST_COLUMNS)
"""What a trajectory is made of."""
COLUMNS = (*SUMMARY_COLUMNS, "finished", *LIST_COLUMNS)

_INT32 = pa.int32()
_NAME = re.compile(r"shard-(?P<writer>[A-Za-z0-9_.]+)-(?P<sequence>\d{6,})-(?P<checksum>[0-9a-f]{32})\.arrow")
_VERSION_KEY = b"trajectory_store.version"
_READABLE_KEY = b"trajectory_store.readable_by"
_PROVENANCE_KEY = b"trajectory_store.provenance"
_ARROW_FAILURES = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, UnicodeDecodeError, MemoryError)
"""What pyarrow may raise on damaged bytes."""


@dataclass(frozen=True)
class ShardName:
    """The parts of a shard's file name."""

    writer: str
    sequence: int
    checksum: str

    def __str__(self) -> str:
        return f"shard-{self.writer}-{self.sequence:06d}-{self.checksum}.arrow"

    @property
    def place(self) -> str:
        """The name but for the checksum: known before the content is, and part of every column's CRC."""
        return f"{self.writer}-{self.sequence}"

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """The parts, or None for a file that is no shard."""
        match = _NAME.fullmatch(name)
        return cls(match["writer"], int(match["sequence"]), match["checksum"]) if match else None


def checksum_of(content: Any) -> str:
    """SHA-256 of a whole file, its first 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def token_type(vocabulary_size: int | None) -> pa.DataType:
    """The narrowest type for token ids: 16 bits where the vocabulary allows, which reads faster and stores smaller."""
    return pa.uint16() if vocabulary_size is not None and vocabulary_size <= 1 << 16 else pa.int32()


def schema(provenance: Provenance, tokens: pa.DataType = _INT32) -> pa.Schema:
    """The Arrow schema of a shard, provenance in its metadata; `tokens` is the type of token ids."""
    types = {name: tokens if name in TOKEN_COLUMNS else _INT32 for name in LIST_COLUMNS}
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
            _VERSION_KEY: str(SCHEMA_VERSION),
            _READABLE_KEY: str(READABLE_BY),
            _PROVENANCE_KEY: provenance.to_json(),
        },
    )


def _list_of(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False))


class FinishedShard(NamedTuple):
    """A shard that waits to be published."""

    name: str
    content: pa.Buffer
    rows: int


class ShardEncoder:
    """Encodes normalised trajectories into the bytes of one shard, in memory."""

    def __init__(
        self,
        provenance: Provenance,
        writer_id: str,
        sequence: int,
        codec: Codec = DEFAULT_CODEC,
        tokens: pa.DataType = _INT32,
    ) -> None:
        self._name = ShardName(writer_id, sequence, "")
        compression = {"zstd": pa.Codec("zstd", ZSTD_LEVEL), "lz4": "lz4", "none": None}[codec]
        self._schema = schema(provenance, tokens)
        self._sink = pa.BufferOutputStream()
        self._writer = ipc.new_file(self._sink, self._schema, options=ipc.IpcWriteOptions(compression=compression))
        self._batches = 0
        self.rows = 0

    @property
    def size_bytes(self) -> int:
        return int(self._sink.tell())

    def add(self, rows: Sequence[Trajectory], iteration_counts: Sequence[int]) -> None:
        """Append the rows as one record batch."""
        batch = record_batch(rows, iteration_counts, self._schema)
        checksums = {
            name: str(_crc(batch.column(i), self._name.place, self._batches, name))
            for i, name in enumerate(batch.schema.names)
        }
        self._writer.write_batch(batch, custom_metadata={"crc32": json.dumps(checksums)})
        self._batches += 1
        self.rows += len(rows)

    def finish(self) -> FinishedShard:
        """The shard's name, which holds the checksum of its bytes, and the bytes."""
        self._writer.close()
        content = self._sink.getvalue()
        return FinishedShard(str(replace(self._name, checksum=checksum_of(content))), content, self.rows)


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
        values = np.concatenate(arrays).astype(list_type.value_type.to_pandas_dtype(), copy=False)
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


def _crc(column: pa.Array, place: str, batch_number: int, name: str) -> int:
    """CRC-32 of a column's values, its list lengths, and where it belongs, so that exchanged files are noticed."""
    value = zlib.crc32(f"{place}:{batch_number}:{name}:{column.type}".encode())
    for part in _column_bytes(column):
        value = zlib.crc32(part, value)
    return value


def _column_bytes(column: pa.Array) -> Iterator[bytes | memoryview]:
    """The column's logical content; buffers themselves may carry padding that differs after a round trip."""
    rows = len(column)
    if rows == 0:
        return
    if pa.types.is_boolean(column.type):
        yield column.to_numpy(zero_copy_only=False).tobytes()
    elif pa.types.is_list(column.type):
        offsets: npt.NDArray[np.int32] = column.offsets.to_numpy()
        values: npt.NDArray[np.int32] = column.values.to_numpy()
        yield offsets.data
        yield values[: int(offsets[-1])].data
    elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        _, offset_buffer, data = column.buffers()
        ends = np.frombuffer(offset_buffer, np.int32, rows + 1)
        yield ends.data
        yield memoryview(data)[: int(ends[-1])] if data is not None else b""
    else:
        fixed: npt.NDArray[np.int32] = column.to_numpy()
        yield fixed.data


class ShardFile:
    """An open shard, read one record batch at a time. Not for use by several threads at once."""

    def __init__(self, folder: Folder, name: str, columns: Sequence[str] = ROW_COLUMNS, verify: bool = True) -> None:
        """Open a shard to read some of its columns; what is in the others is neither read nor checked.

        Raises:
            MissingShardError: there is no such file.
            CorruptShardError: it is no readable shard.
            SchemaVersionError: a newer store wrote it in a way this one would misread.
        """
        self.where = folder.path_of(name)
        self._verify = verify
        parsed = ShardName.parse(name)
        self._place = parsed.place if parsed else ""
        source = folder.open(name)
        try:
            # Arrow's own threads are left out: they gain nothing on batches of this size and cost a fifth more.
            self._reader = ipc.open_file(source, options=ipc.IpcReadOptions(use_threads=False))
            present = self._reader.schema.names
            version = int(self._metadata(_READABLE_KEY))
            if version > SCHEMA_VERSION:
                raise SchemaVersionError(
                    f"{self.where} needs a trajectory store of schema version {version} or newer; this one has "
                    f"{SCHEMA_VERSION}"
                )
            if missing := [column for column in columns if column not in present]:
                raise CorruptShardError(f"{self.where} lacks the columns {', '.join(missing)}")
            included = [present.index(column) for column in columns]
            source.seek(0)
            options = ipc.IpcReadOptions(use_threads=False, included_fields=included)
            self._reader = ipc.open_file(source, options=options)
            self.batches = int(self._reader.num_record_batches)
        except _ARROW_FAILURES as error:
            raise self.damaged("it cannot be opened as an Arrow file", error) from error

    @property
    def tokens(self) -> pa.DataType:
        """The type token ids are stored in."""
        return self._reader.schema.field("tails").type.value_type

    @property
    def provenance(self) -> Provenance:
        try:
            return Provenance.from_dict(json.loads(self._metadata(_PROVENANCE_KEY)))
        except _ARROW_FAILURES as error:
            raise self.damaged("its provenance cannot be read", error) from error

    def read_batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, its columns checked against their checksums.

        Raises:
            CorruptShardError: the bytes are not those that were written.
        """
        try:
            read = self._reader.get_batch_with_custom_metadata(number)
            batch = read.batch
            if self._verify:
                expected = json.loads(read.custom_metadata[b"crc32"])
                for i, name in enumerate(batch.schema.names):
                    if _crc(batch.column(i), self._place, number, name) != int(expected[name]):
                        raise CorruptShardError(f"{self.where}: column {name} of record batch {number} is damaged")
        except _ARROW_FAILURES as error:
            raise self.damaged(f"record batch {number} cannot be read", error) from error
        return batch

    def damaged(self, what: str, cause: BaseException) -> CorruptShardError:
        """The error to raise for an Arrow failure; passes the store's own errors through."""
        if isinstance(cause, CorruptShardError | SchemaVersionError):
            return cause  # type: ignore[return-value]
        return CorruptShardError(f"{self.where} is damaged: {what} ({cause}). `verify` lists every bad shard")

    def _metadata(self, key: bytes) -> str:
        metadata = self._reader.schema.metadata or {}
        if key not in metadata:
            raise CorruptShardError(f"{self.where} is an Arrow file but no trajectory shard")
        return bytes(metadata[key]).decode()


class RowBatch:
    """A decoded record batch as numpy views, from which trajectories are cut without copying."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.rows = batch.num_rows
        self.nbytes = batch.nbytes
        self._ids = batch.column("prompt_id").to_pylist()
        self._finished = batch.column("finished").to_pylist()
        parts = []
        for name in LIST_COLUMNS:
            column = batch.column(name)
            offsets = column.offsets.to_numpy().tolist()
            parts.append(
                (column.values.to_numpy().astype(np.int32, copy=False), list(map(slice, offsets, offsets[1:])))
            )
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
