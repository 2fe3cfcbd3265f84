"""Checking every byte of a round: what is missing, damaged, foreign or left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from pyarrow import ipc

from trajectory_store.checksums import checksum_of_pieces
from trajectory_store.errors import CorruptShardError, ProvenanceMismatchError, SchemaVersionError, StoreError
from trajectory_store.local_files import TEMPORARY_PREFIX
from trajectory_store.manifest import Manifest, RowIndex
from trajectory_store.provenance import Provenance
from trajectory_store.schema import COLUMNS, RowBatch
from trajectory_store.seal import build_manifest
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
    rejected = None
    try:
        rejected = set(round_.rejects())
    except StoreError as error:
        yield Finding("bad", "rejects", str(error))
    if manifest:
        yield from _verify_manifest(round_, manifest, sizes, rejected)


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


def _verify_manifest(
    round_: Round, manifest: Manifest, sizes: Mapping[str, int], rejected: set[str] | None
) -> Iterator[Finding]:
    """Compare index and manifest with those the files would give now; `rejected` is None where that is unknown."""
    try:
        index = RowIndex(round_.folder, manifest)
        counted = {shard.name: sizes.get(shard.name, 0) for shard in manifest.shards}
        rebuilt, content = build_manifest(round_.folder, counted, manifest.provenance, rejected or set())
    except StoreError as error:
        # Damaged shards are named already; an index cannot be compared with them.
        if manifest.index in str(error):
            yield Finding("bad", manifest.index, str(error))
        return
    if not ipc.open_file(content).read_all().equals(index.table):
        yield Finding("bad", manifest.index, "it does not list the rows the shards hold")
    compared = {field.name for field in fields(Manifest)} - {"index", "created_at"}
    if rejected is None:
        compared.remove("rejects")
    if wrong := sorted(name for name in compared if getattr(rebuilt, name) != getattr(manifest, name)):
        yield Finding("bad", MANIFEST_NAME, f"what it says of {', '.join(wrong)} is not so")
