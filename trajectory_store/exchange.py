"""Rounds as files of other formats: export to JSONL, Parquet or the published format, import from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trajectory_store import published
from trajectory_store.errors import InvalidTrajectoryError, StoreError
from trajectory_store.local_files import whole_file
from trajectory_store.provenance import Provenance
from trajectory_store.reader import TrajectoryReader
from trajectory_store.schema import ROW_COLUMNS, RowBatch, record_batch, schema
from trajectory_store.store import Round
from trajectory_store.trajectory import ARRAY_FIELDS, Trajectory

ExportFormat = Literal["jsonl", "parquet", "published"]
ImportFormat = Literal["jsonl", "parquet", "trajectories", "training"]

PARQUET_ROWS = 1024
"""Rows in a row group, which bounds memory on both sides."""
READ_CHARACTERS = 1 << 20
LONGEST_VALUE = 1 << 28
"""Characters after which a value that does not end is taken for damage rather than read on."""

_BETWEEN_VALUES = re.compile(r"[\s,\[\]]*")


def export_round(reader: TrajectoryReader, target: Path, form: ExportFormat) -> int:
    """Write a round's rows, in order, to one local file that appears when it is complete; the number of rows.

    ``jsonl`` has one object per row with the fields of a Trajectory, ``parquet`` the columns of a shard, ``published``
    the trajectory records of the published code, one per line and block.

    Raises:
        StoreUnavailableError: the file cannot be written.
        CorruptShardError: a row cannot be read; no file is left.
    """
    with whole_file(target) as temporary:
        if form == "parquet":
            _export_parquet(reader, temporary)
        else:
            with temporary.open("w") as file:
                for row in reader:
                    for line in _lines(row, reader.manifest.provenance.block_size, form):
                        file.write(json.dumps(line, separators=(",", ":")) + "\n")
    return len(reader)


def _lines(row: Trajectory, block_size: int, form: ExportFormat) -> Iterator[dict[str, Any]]:
    if form == "published":
        yield from published.to_records(row, block_size)
    else:
        arrays = {name: getattr(row, name).tolist() for name in ARRAY_FIELDS}
        yield {"prompt_id": row.prompt_id, "finished": row.finished, **arrays}


def _export_parquet(reader: TrajectoryReader, target: Path) -> None:
    columns = schema(reader.manifest.provenance)
    with pq.ParquetWriter(target, columns, compression="zstd") as writer:
        for start in range(0, len(reader), PARQUET_ROWS):
            stop = min(start + PARQUET_ROWS, len(reader))
            rows = [reader[i] for i in range(start, stop)]
            writer.write_batch(record_batch(rows, reader.iteration_counts[start:stop].tolist(), columns))


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    rows: int
    rejected: int
    """Records that could not be used, each with its reason in the round's rejects."""


def import_file(
    source: Path, round_: Round, provenance: Provenance, form: ImportFormat, end_ids: Sequence[int] = ()
) -> Imported:
    """Append a local file's rows to a round and commit them; rows that contradict themselves become rejects.

    Args:
        end_ids: for the published formats, which do not say where a response ends: cut after the first such token.

    Raises:
        StoreError: the file is not of that format, or has no usable row.
    """
    rows = rejected = 0
    read = _rows(source, provenance, form, end_ids)
    first = list(islice(read, 1))  # a file that is not there or of another format leaves no round behind
    with round_.writer(provenance) as writer:
        for prompt_id, build in chain(first, read):
            try:
                writer.append(build())
                rows += 1
            except InvalidTrajectoryError as error:
                round_.reject(prompt_id, str(error))
                rejected += 1
        if not rows:
            reasons = next(iter(round_.rejects().values()), "it is empty")
            raise StoreError(f"{source} holds no usable row in the format {form!r}: {reasons}")
    return Imported(rows, rejected)


Rows = Iterator[tuple[str, Callable[[], Trajectory]]]


def _rows(source: Path, provenance: Provenance, form: ImportFormat, end_ids: Sequence[int]) -> Rows:
    """Prompt ids and what makes their trajectories, or raises InvalidTrajectoryError, when called."""
    block_size = provenance.block_size
    if form == "parquet":
        yield from _parquet_rows(source, schema(provenance))
    elif form == "jsonl":
        for number, row in enumerate(json_values(source)):
            if not isinstance(row, dict) or row.get("prompt_id") is None:
                raise StoreError(f"{source}: row {number} has no prompt_id: not an exported round")
            yield str(row["prompt_id"]), partial(_from_json, row)
    elif form == "trajectories":
        for group in published.group_records(json_values(source)):
            yield str(group[0]["data_id"]), partial(published.from_records, group, block_size, end_ids)
    else:
        for number, row in enumerate(json_values(source)):
            prompt_id = published.data_id(row, number)
            yield prompt_id, partial(published.from_training_row, row, block_size, end_ids)


def _from_json(row: Mapping[str, Any]) -> Trajectory:
    try:
        arrays = {name: np.asarray(row[name]) for name in ARRAY_FIELDS}  # the writer checks that they are integers
        if not isinstance(row["finished"], bool):
            raise TypeError(f"finished is {row['finished']!r}, neither true nor false")
        return Trajectory(prompt_id=str(row["prompt_id"]), finished=row["finished"], **arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTrajectoryError(f"{row['prompt_id']!r}: not an exported row ({error!r})") from error


def _parquet_rows(source: Path, shard: pa.Schema) -> Rows:
    columns = pa.schema([shard.field(name) for name in ROW_COLUMNS])
    try:
        file = pq.ParquetFile(source)
        for batch in file.iter_batches(PARQUET_ROWS):
            # Whoever wrote the file may have other widths of lists and integers; what does not fit is an error.
            rows = RowBatch(batch.select(columns.names).cast(columns))
            for i in range(rows.rows):
                yield rows[i].prompt_id, partial(rows.__getitem__, i)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{source} is not a Parquet export of a round ({error})") from error


def json_values(source: Path) -> Iterator[Any]:
    """The objects of a JSONL file or of one JSON array, read piece by piece.

    Raises:
        StoreError: the file cannot be read or is not JSON; says at which character.
    """
    decoder = json.JSONDecoder()
    try:
        with source.open(encoding="utf-8-sig") as file:
            text, place, before = "", 0, 0
            while True:
                piece = file.read(READ_CHARACTERS)
                text, place, before = text[place:] + piece, 0, before + place
                while (start := _value_start(text, place)) < len(text):
                    try:
                        value, place = decoder.raw_decode(text, start)
                    except json.JSONDecodeError as error:
                        if piece and len(text) - start < LONGEST_VALUE:
                            place = start  # the value goes on in what is not read yet
                            break
                        raise StoreError(f"{source}: no JSON at character {before + error.pos}") from error
                    yield value
                else:
                    place = len(text)
                if not piece:
                    return
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{source} cannot be read: {error}") from error


def _value_start(text: str, place: int) -> int:
    """Where the next value begins, past white space and the array around values."""
    match = _BETWEEN_VALUES.match(text, place)
    return match.end() if match else place
