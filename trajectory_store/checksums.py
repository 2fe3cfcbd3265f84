"""Checksums: SHA-256 of whole files, CRC-32 of every column of a record batch so that just what is read is checked.

A column's CRC covers its logical content and where it belongs (file, number of the batch, name, type), so that
exchanged files are noticed too. The CRCs travel as the batch's custom metadata, which other Arrow readers ignore.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_KEY = "crc32"


def checksum_of(content: Any) -> str:
    """SHA-256 of a whole file, its first 32 hexadecimal digits."""
    return checksum_of_pieces([content])


def checksum_of_pieces(pieces: Iterable[Any]) -> str:
    """The checksum of a file that comes in pieces."""
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()[:32]


def column_checksums(batch: pa.RecordBatch, place: str, number: int) -> dict[str, str]:
    """Custom metadata for a record batch that is number `number` of the file known as `place`."""
    checksums = {name: str(_crc(batch.column(i), place, number, name)) for i, name in enumerate(batch.schema.names)}
    return {_KEY: json.dumps(checksums)}


def damaged_column(batch: pa.RecordBatch, metadata: Mapping[bytes, bytes], place: str, number: int) -> str | None:
    """The first column whose content is not that of which `metadata` has the checksums, or None.

    Raises:
        KeyError, ValueError: there are no readable checksums.
    """
    expected = json.loads(metadata[_KEY.encode()])
    names: list[str] = batch.schema.names
    for i, name in enumerate(names):
        if _crc(batch.column(i), place, number, name) != int(expected[name]):
            return name
    return None


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
