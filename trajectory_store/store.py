"""The store and its rounds: where writers, rejects, seals and readers are had from.

```
<store>/round-001/shard-<writer>-<sequence>-<checksum>.arrow    committed trajectories
<store>/round-001/rejects/<hash of the prompt id>.json          prompts given up on
<store>/round-001/provenance.json                               what the round's rows have in common
<store>/round-001/index-<checksum>.arrow, manifest.json         once sealed
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from trajectory_store.errors import (
    CorruptShardError,
    InvalidNameError,
    MissingShardError,
    RoundNotFoundError,
    RoundSealedError,
    StoreUnavailableError,
)
from trajectory_store.folder import Folder
from trajectory_store.manifest import Manifest, read_manifest
from trajectory_store.prompt_ids import PromptIds
from trajectory_store.provenance import Provenance
from trajectory_store.reader import DEFAULT_CACHE_BYTES, TrajectoryReader
from trajectory_store.seal import READ_THREADS, build_manifest
from trajectory_store.shard import DEFAULT_CODEC, Codec, ShardFile, ShardName
from trajectory_store.state import MANIFEST_NAME, Stage, announce_seal, look, stage_of, withdraw_seal
from trajectory_store.urls import parted
from trajectory_store.writer import DEFAULT_SHARD_BYTES, TrajectoryWriter

PROVENANCE_NAME = "provenance.json"
REJECTS_FOLDER = "rejects"


class TrajectoryStore:
    """A folder of rounds, on a local path or an object-store URL. Creates nothing until something is written."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.folder = Folder.at(url)

    def round(self, number: int) -> Round:
        """Round `number`, counted from 1."""
        if number < 1:
            raise InvalidNameError(f"rounds count from 1, got {number}")
        return Round(self.folder.child(f"round-{number:03d}"), number)

    def url_of(self, number: int) -> str:
        """What the command line takes for round `number`: parameters of the store's URL stay at its end."""
        address, parameters = parted(self.url)
        return f"{address}/round-{number:03d}{parameters}"

    def rounds(self) -> list[Round]:
        """The rounds that exist, in order."""
        numbers = [int(m[1]) for name in self.folder.folders() if (m := re.fullmatch(r"round-(\d{3,})", name))]
        return [self.round(number) for number in sorted(numbers)]


@dataclass(frozen=True)
class Round:
    """One round of a store. Cheap, picklable, and usable from any number of processes."""

    folder: Folder
    number: int
    _known_ids: dict[str, pa.Array] = field(default_factory=dict, repr=False, compare=False)
    """Prompt ids of shards read before: a shard never changes, so asking again reads only new ones."""
    _known_rejects: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)
    """Prompt id and reason by file; a reject does not change, it is only forgotten."""
    _hashed: set[str] = field(default_factory=set, repr=False, compare=False)
    """Shards whose prompt ids are in ``_hashes``."""
    _hashes: set[int] = field(default_factory=set, repr=False, compare=False)
    """64 bits of each committed prompt id: most questions are answered without looking at the ids."""

    def writer(
        self,
        provenance: Provenance,
        *,
        writer_id: str | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        shard_age_s: float | None = None,
        codec: Codec = DEFAULT_CODEC,
        noise_ratios: Sequence[float] | None = None,
        vocabulary_size: int | None = None,
    ) -> TrajectoryWriter:
        """A writer; see TrajectoryWriter. Sweeps the temporary files of dead writers of this machine.

        Args:
            writer_id: name for the shards' files; by default one that is unique.
            shard_bytes: size at which a shard is committed by itself.
            shard_age_s: time after which buffered rows are committed at the next append.
            codec: compression of the shards.
            noise_ratios: keep only the iterates nearest to one of these (see thinning); by default all.
            vocabulary_size: number of token ids; up to 65,536 they are stored in 16 bits. By default in 32.

        Raises:
            RoundSealedError: the round is sealed.
            ProvenanceMismatchError: the round holds trajectories of another origin.
        """
        self.require_unsealed()
        self._register(provenance)
        for folder in (self.folder, self.folder.child(REJECTS_FOLDER)):
            folder.sweep(everything=False)
        return TrajectoryWriter(
            self,
            provenance,
            writer_id=writer_id,
            shard_bytes=shard_bytes,
            shard_age_s=shard_age_s,
            codec=codec,
            noise_ratios=noise_ratios,
            vocabulary_size=vocabulary_size,
        )

    def reject(self, prompt_id: str, reason: str) -> None:
        """Record that a prompt was given up on. Repeating it changes nothing; the first reason stays.

        Raises:
            InvalidNameError: the prompt id cannot be written as UTF-8.
            RoundSealedError: the round is sealed.
        """
        self.require_unsealed()
        name = _reject_name(prompt_id)
        record = json.dumps({"prompt_id": prompt_id, "reason": reason}, sort_keys=True) + "\n"
        created = self.folder.child(REJECTS_FOLDER).create(name, record.encode())
        too_late = withdraw_seal(self.folder)
        if too_late and created and self._has_uncounted_rejects():
            # Sealed between the check and the record, which would change the numbers of the round's rows.
            self.folder.child(REJECTS_FOLDER).delete(name)
            raise RoundSealedError(f"{self.folder.path} was sealed while {prompt_id!r} was being given up on")

    def rejects(self) -> dict[str, str]:
        """Reason by prompt id for every prompt given up on."""
        folder = self.folder.child(REJECTS_FOLDER)
        names = sorted(name for name in folder.entries() if name.endswith(".json") and not name.startswith("."))
        unknown = [name for name in names if name not in self._known_rejects]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            contents = list(pool.map(lambda name: bytes(folder.read(name)), unknown))
        for name, content in zip(unknown, contents, strict=True):
            try:
                record = json.loads(content)
                self._known_rejects[name] = (str(record["prompt_id"]), str(record["reason"]))
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptShardError(f"{folder.path_of(name)} is not a readable reject record ({error})") from error
        return dict(self._known_rejects[name] for name in names)

    def _has_uncounted_rejects(self) -> bool:
        """Whether more prompts of the sealed round are given up on than when it was sealed."""
        reader = self.reader(verify=False)
        without_row = sum(reader.index.find(prompt_id) is None for prompt_id in self.rejects())
        return without_row > reader.manifest.rejects

    def forget_rejects(self, prompt_ids: Iterable[str]) -> None:
        """Delete the records of prompts given up on, so that collecting the round tries them again.

        Raises:
            RoundSealedError: the round is sealed.
        """
        self.require_unsealed()
        for prompt_id in prompt_ids:
            name = _reject_name(prompt_id)
            self.folder.child(REJECTS_FOLDER).delete(name)
            self._known_rejects.pop(name, None)  # it may be given up on again, for another reason
        withdraw_seal(self.folder)

    def committed_ids(self) -> PromptIds:
        """Prompt ids in all published shards, sealed or not; reads the id columns only.

        Raises:
            CorruptShardError: names a damaged shard. Delete that file and its prompts are collected again.
        """
        return PromptIds(self._ids_of_shards().values())

    def has_committed(self, prompt_id: str) -> bool:
        """Whether a prompt is in a published shard; errors as ``committed_ids``. Asking again reads new shards only."""
        shards = self._ids_of_shards()
        for name in shards.keys() - self._hashed:
            self._hashes.update(map(_hash, shards[name].to_pylist()))
            self._hashed.add(name)
        return _hash(prompt_id) in self._hashes and any(
            pc.index(ids, prompt_id).as_py() >= 0 for ids in shards.values()
        )

    def _ids_of_shards(self) -> dict[str, pa.Array]:
        while True:
            names = self.shard_names()
            unknown = [name for name in names if name not in self._known_ids]
            try:
                with ThreadPoolExecutor(READ_THREADS) as pool:
                    self._known_ids.update(zip(unknown, pool.map(self._ids_of, unknown), strict=True))
            except MissingShardError:
                continue  # taken back by its writer, or compacted since: list again
            return {name: self._known_ids[name] for name in names}

    def _ids_of(self, name: str) -> pa.Array:
        file = ShardFile(self.folder, name, ["prompt_id"])
        columns = [file.read_batch(number)["prompt_id"] for number in range(file.batches)]
        return pa.concat_arrays([pa.array([], pa.string()), *columns])

    def shard_names(self) -> list[str]:
        """Names of the published shards, sorted."""
        return sorted(name for name in self.folder.entries() if ShardName.parse(name))

    def seal(self, provenance: Provenance) -> Manifest:
        """Fix the round's content: decide which rows count, write index and manifest. Sealing again changes nothing.

        Raises:
            ProvenanceMismatchError: the round holds trajectories of another origin.
            CorruptShardError: names a damaged shard. Delete that file, collect again, then seal.
        """
        if not self.is_sealed:
            self._register(provenance)
            self._seal(provenance)
        sealed = self.manifest  # of several sealers the winner's
        sealed.provenance.require_same_origin(provenance, self.folder.path)
        return sealed

    def _seal(self, provenance: Provenance) -> None:
        tried: set[str] = set()
        summaries: dict[str, pa.Table] = {}
        while (announcement := announce_seal(self.folder)) is not None:
            listed = self.folder.entries()
            try:
                manifest, index = build_manifest(self.folder, listed, provenance, set(self.rejects()), known=summaries)
            except MissingShardError:
                continue  # its writer found the round sealed by another sealer and took it back: list again
            try:
                self.folder.publish(manifest.index, index)
                tried.add(manifest.index)
                won = self.folder.replace(MANIFEST_NAME, announcement, manifest.to_json().encode())
            except StoreUnavailableError:
                if not self.is_sealed:
                    raise
                break  # another sealer has won and swept our temporary files away
            if won:
                self.folder.sweep(everything=True)
                break
        for name in tried - {self.manifest.index}:  # of manifests that a commit or another sealer was ahead of
            self.folder.delete(name)

    @property
    def stage(self) -> Stage:
        """Whether the round is open, being sealed by somebody, or sealed."""
        return stage_of(look(self.folder))

    @property
    def is_sealed(self) -> bool:
        return self.stage == "sealed"

    @property
    def manifest(self) -> Manifest:
        """The sealed round's manifest.

        Raises:
            RoundNotSealedError: there is none yet.
        """
        return read_manifest(self.folder)

    @property
    def provenance(self) -> Provenance:
        """What the round's rows have in common.

        Raises:
            RoundNotFoundError: nothing was ever written to the round.
        """
        try:
            return Provenance.from_dict(json.loads(bytes(self.folder.read(PROVENANCE_NAME))))
        except MissingShardError as error:
            raise RoundNotFoundError(f"{self.folder.path} holds no round") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptShardError(f"{self.folder.path_of(PROVENANCE_NAME)} is damaged: {error}") from error

    def reader(self, *, verify: bool = True, cache_bytes: int = DEFAULT_CACHE_BYTES) -> TrajectoryReader:
        """A random-access reader of the sealed round; see TrajectoryReader.

        Raises:
            RoundNotSealedError: the round is not sealed.
            CorruptShardError: manifest or index is damaged.
        """
        return TrajectoryReader(self.folder, self.manifest, verify=verify, cache_bytes=cache_bytes)

    def require_unsealed(self) -> None:
        """Raise RoundSealedError if the round is sealed."""
        if self.is_sealed:
            raise RoundSealedError(f"{self.folder.path} is sealed; write to another round")

    def require_writable(self) -> None:
        """Raise RoundSealedError if the round is sealed, StoreUnavailableError if it vanished under a writer."""
        self.require_unsealed()
        if not self.folder.exists(PROVENANCE_NAME):
            raise StoreUnavailableError(
                f"{self.folder.path} vanished while it was being written to (no {PROVENANCE_NAME}); what is still "
                "buffered was not written, so that a half-empty round is not taken for a whole one"
            )

    def _register(self, provenance: Provenance) -> None:
        if provenance.round_number != self.number:
            raise InvalidNameError(f"provenance is of round {provenance.round_number}, this is round {self.number}")
        if not self.folder.create(PROVENANCE_NAME, (provenance.to_json() + "\n").encode()):
            self.provenance.require_same_origin(provenance, self.folder.path)


def _reject_name(prompt_id: str) -> str:
    try:
        encoded = prompt_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidNameError(f"prompt id {prompt_id!r} cannot be written as UTF-8") from error
    return hashlib.blake2b(encoded, digest_size=16).hexdigest() + ".json"


def _hash(prompt_id: str) -> int:
    # Not Python's own, which differs between processes: a round may be pickled.
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")
