"""Sealing a round: which rows count, in which order, and the manifest that fixes it.

Rows are ordered by prompt id. Of several rows with the same prompt id the one with the smallest digest counts, so the
choice depends on what was written, never on who wrote it or when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trajectory_store.folder import Folder
from trajectory_store.manifest import INDEX_SCHEMA, Manifest, ShardEntry, content_hash, encode_index
from trajectory_store.prompt_ids import PromptIds
from trajectory_store.provenance import Provenance
from trajectory_store.schema import SUMMARY_COLUMNS
from trajectory_store.shard import ShardFile, ShardName

READ_THREADS = 8
"""Shards whose summaries are read at a time; on an object store each is a few requests of some ten milliseconds."""


def shard_summary(folder: Folder, name: str, shard: int, provenance: Provenance) -> pa.Table:
    """A shard's rows as index entries (INDEX_SCHEMA), checked against the round's provenance.

    Raises:
        CorruptShardError: the shard is damaged.
        ProvenanceMismatchError: the shard's rows are of another origin.
    """
    file = ShardFile(folder, name, SUMMARY_COLUMNS)
    file.provenance.require_same_origin(provenance, file.where)
    batches = []
    for number in range(file.batches):
        batch = file.read_batch(number)
        rows = batch.num_rows
        columns = {column: batch.column(column) for column in SUMMARY_COLUMNS}
        columns["shard"] = pa.array(np.full(rows, shard, np.int32))
        columns["batch"] = pa.array(np.full(rows, number, np.int32))
        columns["row"] = pa.array(np.arange(rows, dtype=np.int32))
        arrays = [columns[field.name].cast(field.type) for field in INDEX_SCHEMA]
        batches.append(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    # In one piece: ten million rows in batches of a hundred take 0.4 GB more, for the arrays themselves.
    return pa.Table.from_batches(batches, schema=INDEX_SCHEMA).combine_chunks()


def _numbered(summary: pa.Table, shard: int) -> pa.Table:
    """A shard's summary with another number for the shard."""
    field = INDEX_SCHEMA.get_field_index("shard")
    numbers = pa.array(np.full(summary.num_rows, shard, np.int32))
    return summary.set_column(field, INDEX_SCHEMA.field(field), numbers)


def canonical_index(summaries: Sequence[pa.Table]) -> pa.Table:
    """The rows that count, in canonical order, from the summaries of all shards."""
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *summaries])
    ordered = table.take(pc.sort_indices(table["prompt_id"].combine_chunks())).combine_chunks()
    if _is_first(ordered).all():
        return ordered
    # Sorting by one column is several times as fast, and enough where nobody wrote a prompt twice.
    keys = [(key, "ascending") for key in ("prompt_id", "digest", "shard", "batch", "row")]
    ordered = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    return ordered.filter(pa.array(_is_first(ordered))).combine_chunks()


def _is_first(ordered: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows have another prompt id than the row before them, bool [N]."""
    ids = ordered["prompt_id"].combine_chunks()
    first = np.ones(len(ids), bool)
    if len(ids) > 1:
        first[1:] = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    return first


def build_manifest(
    folder: Folder,
    sizes: Mapping[str, int],
    provenance: Provenance,
    rejected: set[str],
    *,
    known: dict[str, pa.Table] | None = None,
    salt: str = "",
) -> tuple[Manifest, pa.Buffer]:
    """The manifest over shards (file sizes by name; other names are ignored) and the bytes of its index.

    Args:
        known: summaries by shard, so that building again reads only shards that are new; added to here.

    The content hash and the order of rows depend on the rows alone; the index's file name on `salt` too.
    """
    shards = {name: parsed for name in sorted(sizes) if (parsed := ShardName.parse(name))}
    names = list(shards)
    known = {} if known is None else known
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        read = pool.map(lambda name: shard_summary(folder, name, 0, provenance), unknown)
        known.update(zip(unknown, read, strict=True))
    summaries = [_numbered(known[name], shard) for shard, name in enumerate(names)]
    index = canonical_index(summaries)
    index_name, content = encode_index(index, salt)
    response_tokens = index["response_tokens"].to_numpy().astype(np.int64)
    given_up = PromptIds([pa.array(list(rejected), pa.large_string())])
    committed = int(given_up.mask(index["prompt_id"].combine_chunks()).sum()) if rejected else 0
    manifest = Manifest(
        rows=index.num_rows,
        response_tokens=int(response_tokens.sum()),
        blocks=int(np.sum(-(-response_tokens // provenance.block_size))),
        iterations=int(index["iteration_count"].to_numpy().astype(np.int64).sum()),
        rejects=len(rejected) - committed,
        content_hash=content_hash(index),
        provenance=provenance,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        index=index_name,
        shards=tuple(
            ShardEntry(name, summary.num_rows, sizes[name], shards[name].checksum)
            for name, summary in zip(names, summaries, strict=True)
        ),
    )
    return manifest, content
