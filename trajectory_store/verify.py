"""Checking every byte of a round: what is missing, damaged, foreign or left over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trajectory_store.checksums import checksum_of_pieces
from trajectory_store.errors import CorruptShardError, ProvenanceMismatchError, SchemaVersionError, StoreError
from trajectory_store.local_files import TEMPORARY_PREFIX
from trajectory_store.manifest import Manifest, RowIndex
from trajectory_store.provenance import Provenance
from trajectory_store.schema import COLUMNS, RowBatch
from trajectory_store.seal import canonical_index, shard_summary
from trajectory_store.shard import ShardFile, ShardName
from trajectory_store.state import MANIFEST_NAME
from trajectory_store.store import PROVENANCE_NAME, Round
from trajectory_store.trajectory import digest, normalised


@dataclass(frozen=True)
class Finding:
    """Something `verify` wants a person to know about one file."""

    severity: Literal["bad", "note"]
    """``bad``: data the round needs is damaged, missing or does not belong; ``note``: harmless leftovers."""
    name: str
    what: str


def verify_round(round_: Round) -> Iterator[Finding]:
    """Read a round whole and yield whatever is wrong with it; nothing when all is well."""
    sizes = round_.folder.entries()
    try:
        manifest = round_.manifest if round_.is_sealed else None
        provenance = manifest.provenance if manifest else round_.provenance
    except StoreError as error:
        yield Finding("bad", MANIFEST_NAME if round_.is_sealed else PROVENANCE_NAME, str(error))
        return
    counted = [shard.name for shard in manifest.shards] if manifest else []
    for name in sorted({*sizes, *counted}):
        parsed = ShardName.parse(name)
        if name in (MANIFEST_NAME, PROVENANCE_NAME) or (manifest and name == manifest.index):
            continue
        if name.startswith(TEMPORARY_PREFIX):
            yield Finding("note", name, "unfinished write; swept by the next writer or seal once its process is gone")
        elif name not in sizes:
            yield Finding("bad", name, "the manifest names it, but it is missing")
        elif parsed is None:
            yield Finding("note", name, "no file of the store; ignored by readers")
        elif manifest and name not in counted:
            yield Finding("note", name, "the manifest does not name it; ignored by readers")
        else:
            yield from _verify_shard(round_, name, parsed, provenance)
    if manifest:
        yield from _verify_index(round_, manifest)
    try:
        round_.rejects()
    except StoreError as error:
        yield Finding("bad", "rejects", str(error))


def _verify_shard(round_: Round, name: str, parsed: ShardName, provenance: Provenance) -> Iterator[Finding]:
    try:
        if checksum_of_pieces(round_.folder.pieces(name)) != parsed.checksum:
            yield Finding("bad", name, "its bytes do not have the checksum in its name")
            return
        file = ShardFile(round_.folder, name, COLUMNS)
        file.provenance.require_same_origin(provenance, file.where)
        for number in range(file.batches):
            batch = file.read_batch(number)
            digests = batch["digest"].to_pylist()
            rows = RowBatch(batch)
            for row, expected in enumerate(digests):
                if digest(normalised(rows[row], provenance.block_size)) != expected:
                    yield Finding("bad", name, f"row {row} of record batch {number} differs from its digest")
    except (CorruptShardError, SchemaVersionError, ProvenanceMismatchError, ValueError) as error:
        yield Finding("bad", name, str(error))


def _verify_index(round_: Round, manifest: Manifest) -> Iterator[Finding]:
    try:
        index = RowIndex(round_.folder, manifest)
        names = [shard.name for shard in manifest.shards]
        summaries = [shard_summary(round_.folder, name, i, manifest.provenance) for i, name in enumerate(names)]
    except StoreError as error:
        # Damaged shards are named already; an index cannot be compared with them.
        if manifest.index in str(error):
            yield Finding("bad", manifest.index, str(error))
        return
    if not canonical_index(summaries).equals(index.table):
        yield Finding("bad", manifest.index, "it does not list the rows the shards hold")
