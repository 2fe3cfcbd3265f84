"""One shard: an Arrow IPC file of trajectories, named after its writer and its checksum; written and read here.

The file is an ordinary compressed Arrow IPC file (format "file", so that record batches can be fetched one by one).
Its columns are in schema, what guards its bytes in checksums.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import ipc

from trajectory_store.checksums import checksum_of, checksum_of_pieces, column_checksums, damaged_column
from trajectory_store.errors import CorruptShardError, SchemaVersionError, StoreUnavailableError
from trajectory_store.folder import Folder
from trajectory_store.provenance import Provenance
from trajectory_store.schema import (
    INT32,
    PROVENANCE_KEY,
    READABLE_KEY,
    ROW_COLUMNS,
    SCHEMA_VERSION,
    record_batch,
    schema,
)
from trajectory_store.trajectory import Trajectory

T = TypeVar("T")
Codec = Literal["zstd", "lz4", "none"]
DEFAULT_CODEC: Codec = "zstd"
"""By measurement (docs/store.md): a third smaller than LZ4, a quarter of uncompressed, read faster than trained on."""
ZSTD_LEVEL = 1
READ_ATTEMPTS = 3
"""On object stores, beyond what their clients repeat by themselves."""

_NAME = re.compile(r"shard-(?P<writer>[A-Za-z0-9_.]+)-(?P<sequence>\d{6,})-(?P<checksum>[0-9a-f]{32})\.arrow")
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
        tokens: pa.DataType = INT32,
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
        checksums = column_checksums(batch, self._name.place, self._batches)
        self._writer.write_batch(batch, custom_metadata=checksums)
        self._batches += 1
        self.rows += len(rows)

    def finish(self) -> FinishedShard:
        """The shard's name, which holds the checksum of its bytes, and the bytes."""
        self._writer.close()
        content = self._sink.getvalue()
        return FinishedShard(str(replace(self._name, checksum=checksum_of(content))), content, self.rows)


class ShardFile:
    """An open shard, read one record batch at a time. Not for use by several threads at once."""

    def __init__(self, folder: Folder, name: str, columns: Sequence[str] = ROW_COLUMNS, verify: bool = True) -> None:
        """Open a shard to read some of its columns; what is in the others is neither read nor checked.

        Raises:
            MissingShardError: there is no such file.
            CorruptShardError: it is no readable shard.
            StoreUnavailableError: it cannot be fetched at the moment.
            SchemaVersionError: a newer store wrote it in a way this one would misread.
        """
        self.where = folder.path_of(name)
        self._folder = folder
        self._name = name
        self._verify = verify
        parsed = ShardName.parse(name)
        self._place = parsed.place if parsed else ""
        self._reader = self._attempt("it cannot be opened as an Arrow file", lambda: self._open(columns))
        self.batches = int(self._reader.num_record_batches)

    def _open(self, columns: Sequence[str]) -> Any:
        source = self._folder.open(self._name)
        # Arrow's own threads are left out: they gain nothing on batches of this size and cost a fifth more.
        self._reader = ipc.open_file(source, options=ipc.IpcReadOptions(use_threads=False))
        present = self._reader.schema.names
        version = int(self._metadata(READABLE_KEY))
        if version > SCHEMA_VERSION:
            raise SchemaVersionError(
                f"{self.where} needs a trajectory store of schema version {version} or newer; this one has "
                f"{SCHEMA_VERSION}"
            )
        if missing := [column for column in columns if column not in present]:
            raise CorruptShardError(f"{self.where} lacks the columns {', '.join(missing)}")
        included = [present.index(column) for column in columns]
        source.seek(0)
        return ipc.open_file(source, options=ipc.IpcReadOptions(use_threads=False, included_fields=included))

    @property
    def tokens(self) -> pa.DataType:
        """The type token ids are stored in."""
        return self._reader.schema.field("tails").type.value_type

    @property
    def provenance(self) -> Provenance:
        return self._attempt(
            "its provenance cannot be read", lambda: Provenance.from_dict(json.loads(self._metadata(PROVENANCE_KEY)))
        )

    def read_batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, its columns checked against their checksums.

        Raises:
            CorruptShardError: the bytes are not those that were written.
            StoreUnavailableError: they cannot be fetched at the moment.
        """

        def read() -> pa.RecordBatch:
            got = self._reader.get_batch_with_custom_metadata(number)
            if self._verify and (name := damaged_column(got.batch, got.custom_metadata, self._place, number)):
                raise ValueError(f"its column {name} does not have its checksum")
            return got.batch

        return self._attempt(f"record batch {number} cannot be read", read)

    def _attempt(self, what: str, action: Callable[[], T]) -> T:
        """Do what may fail on damaged bytes; on an object store also what may fail for a moment."""
        for attempt in range(1 if self._folder.is_local else READ_ATTEMPTS):
            if attempt:
                time.sleep(0.2 * 4**attempt)
            try:
                return action()
            except StoreUnavailableError:
                raise
            except _ARROW_FAILURES as error:
                cause: Exception = error
                # pyarrow's errors do not tell a failed request from damaged bytes; the file's checksum does.
                if self._folder.is_local or not self._is_intact():
                    break
        else:
            raise StoreUnavailableError(f"{self.where} is intact, but {what} ({cause}): try again") from cause
        raise CorruptShardError(f"{self.where} is damaged: {what} ({cause}). `verify` lists every bad shard") from cause

    def _is_intact(self) -> bool:
        parsed = ShardName.parse(self._name)
        return parsed is not None and checksum_of_pieces(self._folder.pieces(self._name)) == parsed.checksum

    def _metadata(self, key: bytes) -> str:
        metadata = self._reader.schema.metadata or {}
        if key not in metadata:
            raise CorruptShardError(f"{self.where} is an Arrow file but no trajectory shard")
        return bytes(metadata[key]).decode()
