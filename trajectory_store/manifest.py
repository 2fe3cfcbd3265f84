"""What a sealed round consists of: the manifest (JSON) and the row index (Arrow) it names.

The index lists the round's rows in their canonical order, by prompt id, and says where each one lies. It is what makes
a round independent of which worker wrote what: rows are numbered by the index, duplicates and rows of no account are
simply not in it, and the content hash is taken over it.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import re
import tempfile
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import ipc

from trajectory_store.checksums import checksum_of, checksum_of_pieces
from trajectory_store.errors import (
    CorruptShardError,
    RoundNotSealedError,
    SchemaVersionError,
    StoreError,
    StoreUnavailableError,
)
from trajectory_store.folder import Folder
from trajectory_store.provenance import Provenance
from trajectory_store.schema import READABLE_BY, SCHEMA_VERSION
from trajectory_store.shard import ShardName
from trajectory_store.state import MANIFEST_NAME, look, stage_of

INDEX_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.large_string(), nullable=False),
        pa.field("digest", pa.large_binary(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("iteration_count", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest knows it."""

    name: str
    rows: int
    """Rows in the file, duplicates included."""
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """The sealed content of a round."""

    rows: int
    response_tokens: int
    blocks: int
    iterations: int
    """Iterations of all blocks together; divided by `blocks` it is the figure that falls from round to round."""
    rejects: int
    """Prompts given up on, each with its reason in the round's rejects."""
    content_hash: str
    """Hash of the logical rows in canonical order: the same however the work was spread, interrupted or retried."""
    provenance: Provenance
    created_at: str
    """When the round was sealed, ISO 8601, UTC."""
    index: str
    """File name of the row index; the checksum of its bytes is part of it."""
    shards: tuple[ShardEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def iterations_per_block(self) -> float:
        return self.iterations / self.blocks if self.blocks else 0.0

    def to_json(self) -> str:
        content = {"schema_version": SCHEMA_VERSION, "readable_by": READABLE_BY, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | builtins.bytes, where: str) -> Manifest:
        """The manifest a JSON text holds.

        Raises:
            CorruptShardError: it is no manifest.
            SchemaVersionError: written by a store too new for this one.
        """
        try:
            values = json.loads(text)
            if values["readable_by"] > SCHEMA_VERSION:
                raise SchemaVersionError(f"{where} was written by a newer trajectory store; upgrade to read it")
            return cls._from_dict(values)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptShardError(f"{where} is not a readable manifest ({error})") from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        return cls(
            rows=values["rows"],
            response_tokens=values["response_tokens"],
            blocks=values["blocks"],
            iterations=values["iterations"],
            rejects=values["rejects"],
            content_hash=values["content_hash"],
            provenance=Provenance.from_dict(values["provenance"]),
            created_at=values["created_at"],
            index=values["index"],
            shards=tuple(ShardEntry(s["name"], s["rows"], s["bytes"], s["checksum"]) for s in values["shards"]),
        )

    def __post_init__(self) -> None:
        # Read from a file, they become parts of paths.
        if not re.fullmatch(r"index-[0-9a-f]+\.arrow", self.index):
            raise ValueError(f"{self.index!r} is no name of a row index")
        for shard in self.shards:
            if ShardName.parse(shard.name) is None:
                raise ValueError(f"{shard.name!r} is no name of a shard")


def read_manifest(folder: Folder) -> Manifest:
    """The manifest in a round's folder.

    Raises:
        RoundNotSealedError: there is none.
        CorruptShardError: it is damaged.
    """
    where = folder.path_of(MANIFEST_NAME)
    content = look(folder)
    while True:
        if content is None or stage_of(content) != "sealed":
            raise RoundNotSealedError(f"{folder.path} is not sealed: it has no manifest yet")
        try:
            return Manifest.from_json(content, where)
        except CorruptShardError:
            # A file of an object store that is replaced while it is read comes cut to the length of the one before.
            before, content = content, look(folder)
            if content == before:
                raise


def content_hash(index: pa.Table) -> str:
    """SHA-256 over prompt ids and row digests in canonical order, hexadecimal."""
    hasher = hashlib.sha256(f"trajectory_store:{SCHEMA_VERSION}:{index.num_rows}".encode())
    for batch in index.select(["prompt_id", "digest"]).to_batches(max_chunksize=1 << 16):  # not all as Python objects
        for prompt_id, digest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            hasher.update(f"{len(prompt_id.encode())}:{prompt_id}".encode())
            hasher.update(digest)
    return hasher.hexdigest()


def encode_index(index: pa.Table, salt: str = "") -> tuple[str, pa.Buffer]:
    """File name and bytes of a row index; another `salt` gives the same rows another name."""
    index = index.combine_chunks()

    def write(sink: Any) -> None:
        with ipc.new_file(sink, INDEX_SCHEMA.with_metadata({"salt": salt} if salt else None)) as writer:
            # One batch, uncompressed: mapped into memory and searched in place.
            writer.write_table(index)

    measure = pa.MockOutputStream()
    write(measure)
    content = pa.allocate_buffer(measure.size())  # a sink that grows would hold a large index several times
    write(pa.FixedSizeBufferWriter(content))
    return _index_name(checksum_of(content)), content


def _index_name(checksum: str) -> str:
    return f"index-{checksum}.arrow"


class RowIndex:
    """The row index of a sealed round, mapped into memory."""

    def __init__(self, folder: Folder, manifest: Manifest, verify: bool = True) -> None:
        """Map the index the manifest names.

        Raises:
            CorruptShardError: its bytes or its length are not what the manifest says.
        """
        where = folder.path_of(manifest.index)
        damaged = CorruptShardError(f"{where} is damaged: its checksum is not the one in its name")
        # A local index is mapped once more for its rows, so that of those only the pages stay that are used.
        if (
            verify
            and folder.is_local
            and manifest.index != _index_name(checksum_of_pieces(folder.pieces(manifest.index)))
        ):
            raise damaged
        source = folder.open(manifest.index) if folder.is_local else _spool(folder, manifest.index)
        content = source.read_buffer()
        if verify and not folder.is_local and manifest.index != _index_name(checksum_of(content)):
            raise damaged
        try:
            table = ipc.open_file(pa.BufferReader(content)).read_all()
        except (pa.ArrowException, OSError) as error:
            raise CorruptShardError(f"{where} is damaged: {error}") from error
        if table.num_rows != manifest.rows:
            raise CorruptShardError(f"{where} has {table.num_rows} rows, the manifest says {manifest.rows}")
        self.table = table
        self._id_offsets, self._id_bytes = _text_buffers(table["prompt_id"])
        self.prompt_lengths = self._numbers("prompt_tokens")
        self.response_lengths = self._numbers("response_tokens")
        self.iteration_counts = self._numbers("iteration_count")
        self.shards = self._numbers("shard")
        self.batches = self._numbers("batch")
        self.rows = self._numbers("row")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def prompt_id(self, i: int) -> str:
        return self._encoded_id(i).decode()

    def find(self, prompt_id: str) -> int | None:
        """Position of a prompt id, by binary search, or None."""
        wanted = prompt_id.encode(errors="surrogatepass")  # one that is no Unicode, from a command line, is nobody's
        i = bisect_left(range(len(self)), wanted, key=self._encoded_id)
        return i if i < len(self) and self._encoded_id(i) == wanted else None

    def _encoded_id(self, i: int) -> bytes:
        return bytes(self._id_bytes[self._id_offsets[i] : self._id_offsets[i + 1]])

    def _numbers(self, name: str) -> npt.NDArray[np.int32]:
        column = self.table[name]
        return np.asarray(column.chunk(0).to_numpy() if column.num_chunks else np.zeros(0), np.int32)


def _text_buffers(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], memoryview]:
    if column.num_chunks == 0 or len(column) == 0:
        return np.zeros(1, np.int64), memoryview(b"")
    _, offsets, data = column.chunk(0).buffers()
    return np.frombuffer(offsets, np.int64, len(column) + 1), memoryview(data)


def _spool(folder: Folder, name: str) -> Any:
    """A remote file copied to an unnamed local one and mapped, so that it costs disk and page cache, not heap."""
    try:
        with tempfile.NamedTemporaryFile(prefix="trajectory-index-") as copy:
            copy.writelines(folder.pieces(name))
            copy.flush()
            return pa.memory_map(copy.name)
    except StoreError:
        raise
    except OSError as error:
        raise StoreUnavailableError(
            f"cannot copy {folder.path_of(name)} to a temporary file here: {error}; TMPDIR may name a folder with room"
        ) from error
