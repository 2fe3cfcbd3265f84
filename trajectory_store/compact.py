"""Compaction: many small shards become few large ones with rows in canonical order, while readers read.

New shards are published first, then the manifest is replaced in one step, then the old shards are deleted. Killed in
between, the round is whole before and after; what is left over is removed by the next compaction. A reader that misses
an old shard looks at the manifest again and goes on in the new shards: same rows, same numbers, same content hash.
"""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from trajectory_store.errors import StoreError
from trajectory_store.manifest import MANIFEST_NAME, Manifest
from trajectory_store.seal import build_manifest
from trajectory_store.shard import DEFAULT_CODEC, Codec, ShardEncoder, ShardFile, ShardName
from trajectory_store.store import Round
from trajectory_store.writer import BATCH_BYTES

DEFAULT_COMPACT_BYTES = 256 << 20
WRITER_ID = "compact"


def compact_round(round_: Round, shard_bytes: int = DEFAULT_COMPACT_BYTES, codec: Codec = DEFAULT_CODEC) -> Manifest:
    """Rewrite a sealed round into shards of about `shard_bytes`; the content hash stays as it is.

    Raises:
        RoundNotSealedError: only a sealed round is compacted.
        CorruptShardError: a row cannot be read; nothing is changed.
    """
    old = round_.manifest
    sizes = _rewrite(round_, shard_bytes, codec)
    rebuilt, index = build_manifest(round_.folder, sizes, old.provenance, set())
    if rebuilt.content_hash != old.content_hash:
        raise StoreError(f"{round_.folder.path}: the compacted rows differ from the sealed ones; nothing was changed")
    new = replace(rebuilt, rejects=old.rejects, created_at=old.created_at)
    round_.folder.publish(new.index, index)
    round_.folder.publish(MANIFEST_NAME, new.to_json().encode())
    _delete_leftovers(round_, new)
    return new


def _rewrite(round_: Round, shard_bytes: int, codec: Codec) -> dict[str, int]:
    """Publish the rows again, in canonical order; sizes of the new shards by name."""
    reader = round_.reader()
    sizes: dict[str, int] = {}
    shards = [shard.name for shard in reader.manifest.shards]
    narrow = all(ShardFile(round_.folder, name, ["tails"]).tokens == pa.uint16() for name in shards)
    tokens = pa.uint16() if narrow else pa.int32()
    encoder = ShardEncoder(reader.manifest.provenance, WRITER_ID, 0, codec, tokens)
    pending, counts, pending_bytes = [], [], 0
    for i, row in enumerate(reader):
        pending.append(row)
        counts.append(int(reader.iteration_counts[i]))
        pending_bytes += row.nbytes
        last = i == len(reader) - 1
        if last or pending_bytes >= BATCH_BYTES:
            encoder.add(pending, counts)
            pending, counts, pending_bytes = [], [], 0
        if last or encoder.size_bytes >= shard_bytes:
            shard = encoder.finish()
            round_.folder.publish(shard.name, shard.content)
            sizes[shard.name] = len(shard.content)
            encoder = ShardEncoder(reader.manifest.provenance, WRITER_ID, len(sizes), codec, tokens)
    return sizes


def _delete_leftovers(round_: Round, manifest: Manifest) -> None:
    named = {manifest.index, *(shard.name for shard in manifest.shards)}
    for name in round_.folder.entries():
        is_index = name.startswith("index-") and name.endswith(".arrow")
        if name not in named and (is_index or ShardName.parse(name)):
            round_.folder.delete(name)
