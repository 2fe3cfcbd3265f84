"""Compaction: many small shards become few large ones with rows in canonical order, while readers read.

New shards are published first, then the manifest is replaced in one step, then the old shards are deleted. Killed in
between, the round is whole before and after; what is left over is removed by the next compaction. A reader that misses
an old shard looks at the manifest again and goes on in the new shards: same rows, same numbers, same content hash. Of
two compactions at once the first to replace the manifest counts.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa

from trajectory_store.errors import MissingShardError, StoreError
from trajectory_store.manifest import Manifest
from trajectory_store.seal import build_manifest
from trajectory_store.shard import DEFAULT_CODEC, Codec, FinishedShard, ShardEncoder, ShardFile, ShardName
from trajectory_store.state import MANIFEST_NAME, look
from trajectory_store.store import Round
from trajectory_store.writer import BATCH_BYTES

DEFAULT_COMPACT_BYTES = 256 << 20


def compact_round(round_: Round, shard_bytes: int = DEFAULT_COMPACT_BYTES, codec: Codec = DEFAULT_CODEC) -> Manifest:
    """Rewrite a sealed round into shards of about `shard_bytes`; the content hash stays as it is.

    Raises:
        RoundNotSealedError: only a sealed round is compacted.
        CorruptShardError: a row cannot be read; nothing is changed.
        StoreUnavailableError: the place is full, say; what was written of the new shards is removed.
        StoreError: another compaction of the round was faster; nothing is changed.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    before = look(round_.folder) or b""
    old = round_.manifest
    # Unique names: what one compaction deletes is never what another has just written.
    unique = f"compact_{secrets.token_hex(4)}"
    sizes: dict[str, int] = {}
    overtaken = StoreError(f"{round_.folder.path} was compacted by somebody else meanwhile; nothing was changed")
    try:
        for shard in _rewritten(round_, unique, shard_bytes, codec):
            sizes[shard.name] = len(shard.content)
            round_.folder.publish(shard.name, shard.content)
        rebuilt, index = build_manifest(round_.folder, sizes, old.provenance, set(), salt=unique)
        if rebuilt.content_hash != old.content_hash:
            raise StoreError(
                f"{round_.folder.path}: the compacted rows differ from the sealed ones; nothing was changed"
            )
        new = replace(rebuilt, rejects=old.rejects, created_at=old.created_at)
        round_.folder.publish(new.index, index)
        # Listed before the manifest is replaced: what another compaction writes from now on builds on the new manifest.
        present = round_.folder.entries()
    except StoreError as error:
        with suppress(StoreError):  # a disk that is full now would be full the next time too
            _delete(round_, sizes)
        if isinstance(error, MissingShardError) and look(round_.folder) != before:
            raise overtaken from error
        raise
    if not round_.folder.replace(MANIFEST_NAME, before, new.to_json().encode()):
        _delete(round_, [*sizes, new.index])
        raise overtaken
    _delete(round_, present.keys() - {new.index, *sizes})
    return new


def _delete(round_: Round, names: Iterable[str]) -> None:
    for name in names:
        if ShardName.parse(name) or (name.startswith("index-") and name.endswith(".arrow")):
            round_.folder.delete(name)


def _rewritten(round_: Round, writer_id: str, shard_bytes: int, codec: Codec) -> Iterator[FinishedShard]:
    """The rows once more, in canonical order."""
    reader = round_.reader()
    shards = [shard.name for shard in reader.manifest.shards]
    narrow = all(ShardFile(round_.folder, name, ["tails"]).tokens == pa.uint16() for name in shards)
    tokens = pa.uint16() if narrow else pa.int32()
    sequence = 0
    encoder = ShardEncoder(reader.manifest.provenance, writer_id, sequence, codec, tokens)
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
            yield encoder.finish()
            sequence += 1
            encoder = ShardEncoder(reader.manifest.provenance, writer_id, sequence, codec, tokens)
