"""Random access to the trajectories of a sealed round, verified, with bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trajectory_store.errors import CorruptShardError
from trajectory_store.folder import Folder
from trajectory_store.manifest import Manifest, RowIndex
from trajectory_store.shard import RowBatch, ShardFile
from trajectory_store.trajectory import Trajectory

DEFAULT_CACHE_BYTES = 256 << 20
MAX_OPEN_SHARDS = 256


@dataclass
class OpenShard:
    """A shard some thread has opened or is about to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    file: ShardFile | None = None


class TrajectoryReader:
    """The rows of a sealed round in canonical order (by prompt id), whoever wrote them.

    `reader[i]` decodes one record batch and keeps it with the recently used ones, up to `cache_bytes`; token arrays
    are read-only views into it. Safe for several threads.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, *, verify: bool = True, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.manifest = manifest
        self._folder = folder
        self._verify = verify
        self._index = RowIndex(folder, manifest, verify)
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[int, int], RowBatch] = OrderedDict()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Prompt tokens of each row, [N]."""
        return self._index.prompt_lengths

    @property
    def response_lengths(self) -> npt.NDArray[np.int32]:
        """Response tokens of each row, [N]."""
        return self._index.response_lengths

    @property
    def iteration_counts(self) -> npt.NDArray[np.int32]:
        """Stored iterates (= iterations of all blocks) of each row, [N]."""
        return self._index.iteration_counts

    def __getitem__(self, i: int) -> Trajectory:
        """Row i.

        Raises:
            IndexError: there is no such row.
            CorruptShardError: the shard that holds it is damaged or gone.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self._folder.path}")
        i %= len(self)
        index = self._index
        shard, batch, row = int(index.shards[i]), int(index.batches[i]), int(index.rows[i])
        return self._checked(i, self._batch(shard, batch)[row])

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def scan(self) -> Iterator[Trajectory]:
        """Every row once, in the order they are stored in: the fastest way to read a whole round."""
        index = self._index
        order = np.lexsort((index.rows, index.batches, index.shards))
        starts = np.flatnonzero(np.diff(index.shards[order], prepend=-1) | np.diff(index.batches[order], prepend=-1))
        for places in np.split(order, starts[1:]) if len(order) else ():
            batch = self._decode(int(index.shards[places[0]]), int(index.batches[places[0]]))
            for i, row in zip(places.tolist(), index.rows[places].tolist(), strict=True):
                yield self._checked(i, batch[row])

    def prompt_id(self, i: int) -> str:
        """Prompt id of row i, without reading the row."""
        return self._index.prompt_id(i)

    def find(self, prompt_id: str) -> Trajectory | None:
        """The row of a prompt, or None when the round has none."""
        i = self._index.find(prompt_id)
        return None if i is None else self[i]

    def _checked(self, i: int, trajectory: Trajectory) -> Trajectory:
        if self._verify and trajectory.prompt_id != self._index.prompt_id(i):
            shard = self.manifest.shards[int(self._index.shards[i])]
            raise CorruptShardError(
                f"{self._folder.path_of(shard.name)} holds {trajectory.prompt_id!r} where the index says "
                f"{self._index.prompt_id(i)!r}"
            )
        return trajectory

    def _batch(self, shard: int, number: int) -> RowBatch:
        key = (shard, number)
        with self._lock:
            if cached := self._cache.get(key):
                self._cache.move_to_end(key)
                return cached
        batch = self._decode(shard, number)
        with self._lock:
            if key not in self._cache:
                self._cached_bytes += batch.nbytes
            self._cache[key] = batch
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return batch

    def _decode(self, shard: int, number: int) -> RowBatch:
        # Shards are locked one by one, so that threads fetch and decode from several at a time.
        with self._lock:
            entry = self._open.setdefault(shard, OpenShard())
            self._open.move_to_end(shard)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        with entry.lock:
            if entry.file is None:
                entry.file = ShardFile(self._folder, self.manifest.shards[shard].name, verify=self._verify)
            return RowBatch(entry.file.read_batch(number))
