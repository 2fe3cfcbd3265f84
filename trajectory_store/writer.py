"""Writing trajectories into a round: buffering, closing shards, publishing them atomically."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, get_args

from trajectory_store.errors import InvalidNameError, RoundSealedError, StoreError, StoreUnavailableError
from trajectory_store.local_files import host_name
from trajectory_store.provenance import Provenance
from trajectory_store.schema import token_type
from trajectory_store.shard import DEFAULT_CODEC, Codec, FinishedShard, ShardEncoder
from trajectory_store.state import withdraw_seal
from trajectory_store.thinning import thinned
from trajectory_store.trajectory import Trajectory, normalised, require_vocabulary

if TYPE_CHECKING:
    from trajectory_store.store import Round

DEFAULT_SHARD_BYTES = 64 << 20
BATCH_BYTES = 512 << 10
"""Token bytes (before compression) in a record batch: the unit of random access."""


class TrajectoryWriter:
    """Publishes trajectories as shards. One per process or thread; any number may write to one round at once.

    Used as a context manager: leaving it commits what is buffered, an exception discards what is buffered. A shard is
    also committed by itself when it reaches `shard_bytes`, or when rows have waited `shard_age_s` at the next append.
    """

    def __init__(
        self,
        round_: Round,
        provenance: Provenance,
        *,
        writer_id: str | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        shard_age_s: float | None = None,
        codec: Codec = DEFAULT_CODEC,
        noise_ratios: Sequence[float] | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        if writer_id is None:
            writer_id = f"{host_name()}_{os.getpid()}_{secrets.token_hex(3)}"
        if not re.fullmatch(r"[A-Za-z0-9_.]{1,80}", writer_id):
            raise InvalidNameError(f"writer id {writer_id!r} must be 1 to 80 letters, digits, '_' or '.'")
        if codec not in get_args(Codec):  # seen now rather than when the first rows are encoded, and lost by it
            raise ValueError(f"codec must be one of {', '.join(get_args(Codec))}, got {codec!r}")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
        self.writer_id = writer_id
        self.committed_rows = 0
        self._round = round_
        self._provenance = provenance
        self._shard_bytes = shard_bytes
        self._shard_age_s = shard_age_s
        self._codec: Codec = codec
        self._noise_ratios = noise_ratios
        self._vocabulary_size = vocabulary_size
        self._sequence = 0
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._rows: list[Trajectory] = []
        self._iteration_counts: list[int] = []
        self._rows_bytes = 0
        self._encoder: ShardEncoder | None = None
        self._finished: list[FinishedShard] = []
        self._ids: set[str] = set()
        self._oldest = 0.0

    def append(self, trajectory: Trajectory) -> None:
        """Buffer a trajectory; a prompt id that is already buffered is ignored.

        Raises:
            InvalidTrajectoryError: its parts contradict each other; the buffer is as before.
            RoundSealedError: a full shard was due, but the round has been sealed meanwhile.
            StoreUnavailableError: a full shard was due, but could not be written; its rows stay buffered.
        """
        if self._closed:
            raise StoreError(f"writer {self.writer_id} is closed")
        row = normalised(trajectory, self._provenance.block_size)
        if self._vocabulary_size is not None:
            require_vocabulary(row, self._vocabulary_size)
        if row.prompt_id in self._ids:
            return
        if not self._ids:
            self._oldest = time.monotonic()
        self._ids.add(row.prompt_id)
        self._iteration_counts.append(len(row.accepted))
        if self._noise_ratios is not None:
            row = thinned(row, self._provenance.block_size, self._noise_ratios)
        self._rows.append(row)
        self._rows_bytes += row.nbytes
        if self._rows_bytes >= BATCH_BYTES:
            self._encode_rows()
        aged = self._shard_age_s is not None and time.monotonic() - self._oldest >= self._shard_age_s
        encoded_bytes = self._encoder.size_bytes if self._encoder is not None else 0
        if aged or encoded_bytes + self._rows_bytes >= self._shard_bytes:
            self.commit()

    def commit(self) -> str | None:
        """Publish the buffered rows as one shard and return its file name; None when nothing is buffered.

        Raises:
            RoundSealedError: the round is sealed and these rows are not part of it.
            StoreUnavailableError: the shard could not be written. What is buffered stays buffered: commit again.
        """
        self._encode_rows()
        if self._encoder is not None:
            self._finished.append(self._encoder.finish())
            self._encoder = None
        name = None
        while self._finished:
            self._publish(self._finished[0])
            name = self._finished[0].name
            self.committed_rows += self._finished.pop(0).rows
        self._reset()
        return name

    def _publish(self, shard: FinishedShard) -> None:
        self._round.require_writable()
        try:
            self._round.folder.publish(shard.name, shard.content)
        except StoreUnavailableError:
            self._round.require_unsealed()  # a sealer sweeps the temporary files of writers that are too late
            raise
        too_late = withdraw_seal(self._round.folder)
        if too_late and shard.name not in {entry.name for entry in self._round.manifest.shards}:
            # Sealed between the check and the publish: the shard is debris.
            self._round.folder.delete(shard.name)
            raise RoundSealedError(f"{self._round.folder.path} was sealed while {shard.name} was being written")

    def discard(self) -> None:
        """Forget what is buffered."""
        self._reset()

    def close(self) -> None:
        """Commit what is buffered and accept no more."""
        if not self._closed:
            self.commit()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
            self._closed = True

    def _encode_rows(self) -> None:
        if self._rows:
            if self._encoder is None:
                tokens = token_type(self._vocabulary_size)
                self._encoder = ShardEncoder(self._provenance, self.writer_id, self._sequence, self._codec, tokens)
                self._sequence += 1
            self._encoder.add(self._rows, self._iteration_counts)
            self._rows, self._iteration_counts = [], []
            self._rows_bytes = 0
