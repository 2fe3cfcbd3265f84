"""Random access to the trajectories of a sealed round, verified, with bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trajectory_store.errors import MissingShardError
from trajectory_store.folder import Folder
from trajectory_store.manifest import Manifest, RowIndex, read_manifest
from trajectory_store.schema import COLUMNS, RowBatch
from trajectory_store.shard import ShardFile
from trajectory_store.trajectory import Trajectory

DEFAULT_CACHE_BYTES = 256 << 20
MAX_OPEN_SHARDS = 256


@dataclass
class OpenShard:
    """A shard some thread has opened or is about to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    file: ShardFile | None = None


class Layout:
    """Where the rows of a round lie according to one manifest, with the shards open and the record batches decoded.

    Compaction changes where rows lie but not the rows: a reader then goes on with a new layout.
    """

    def __init__(self, folder: Folder, manifest: Manifest, verify: bool, cache_bytes: int) -> None:
        self.manifest = manifest
        self.index = RowIndex(folder, manifest, verify)
        self._folder = folder
        self._verify = verify
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[int, int], RowBatch] = OrderedDict()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, i: int) -> Trajectory:
        """Row i, from the cache or decoded and kept."""
        index = self.index
        key = (int(index.shards[i]), int(index.batches[i]))
        with self._lock:
            batch = self._cache.get(key)
            if batch is not None:
                self._cache.move_to_end(key)
        if batch is None:
            batch = self.decode(*key)
            with self._lock:
                if key not in self._cache:
                    self._cached_bytes += batch.nbytes
                self._cache[key] = batch
                while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                    self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return batch[int(index.rows[i])]

    def decode(self, shard: int, number: int) -> RowBatch:
        """A record batch, read and verified."""
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


class TrajectoryReader:
    """The rows of a sealed round in canonical order (by prompt id), whoever wrote them.

    `reader[i]` decodes one record batch and keeps it with the recently used ones, up to `cache_bytes`; token arrays
    are read-only views into it, so that whoever keeps rows keeps their `copy()`. Safe for several threads, and while
    the round is being compacted.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, *, verify: bool = True, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self._folder = folder
        self._verify = verify
        self._cache_bytes = cache_bytes
        self._layout = present_layout(folder, manifest, verify, cache_bytes)

    def __len__(self) -> int:
        return len(self._layout.index)

    @property
    def manifest(self) -> Manifest:
        return self._layout.manifest

    @property
    def where(self) -> str:
        """The round's folder."""
        return self._folder.path

    @property
    def index(self) -> RowIndex:
        """Where each row lies, as of the last time that was looked at."""
        return self._layout.index

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Prompt tokens of each row, [N]."""
        return self._layout.index.prompt_lengths

    @property
    def response_lengths(self) -> npt.NDArray[np.int32]:
        """Response tokens of each row, [N]."""
        return self._layout.index.response_lengths

    @property
    def iteration_counts(self) -> npt.NDArray[np.int32]:
        """Iterations all blocks of each row needed together, [N]; not fewer than the iterates stored."""
        return self._layout.index.iteration_counts

    def __getitem__(self, i: int) -> Trajectory:
        """Row i.

        Raises:
            IndexError: there is no such row.
            CorruptShardError: the shard that holds it is damaged or gone.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self._folder.path}")
        i %= len(self)
        layout = self._layout
        while True:
            try:
                return layout.row(i)
            except MissingShardError as error:
                layout = self._moved(layout, error)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def scan(self) -> Iterator[Trajectory]:
        """Every row once, in the order they are stored in: the fastest way to read a whole round."""
        layout = self._layout
        for shard, number, places in _record_batches(layout.index):
            try:
                batch = layout.decode(shard, number)
            except MissingShardError:
                yield from (self[i] for i in places.tolist())
                continue
            yield from (batch[row] for row in layout.index.rows[places].tolist())

    def columns(self, *names: str) -> Iterator[pa.RecordBatch]:
        """Some columns (schema.COLUMNS) of every row once, in the order they are stored in; no others are fetched.

        Raises:
            KeyError: there is no such column.
            MissingShardError: the round was compacted since this reader last looked; begin again.
        """
        if unknown := set(names) - set(COLUMNS):
            raise KeyError(f"no columns {sorted(unknown)}; there are {', '.join(COLUMNS)}")
        layout = self._layout
        for shard, batches in groupby(_record_batches(layout.index), key=itemgetter(0)):
            file = ShardFile(self._folder, layout.manifest.shards[shard].name, names, self._verify)
            for _, number, places in batches:
                yield file.read_batch(number).take(pa.array(layout.index.rows[places]))

    def prompt_id(self, i: int) -> str:
        """Prompt id of row i, without reading the row."""
        return self._layout.index.prompt_id(i)

    def find(self, prompt_id: str) -> Trajectory | None:
        """The row of a prompt, or None when the round has none."""
        i = self._layout.index.find(prompt_id)
        return None if i is None else self[i]

    def _moved(self, layout: Layout, cause: MissingShardError) -> Layout:
        """The round's present layout, when the rows lie elsewhere than in `layout`; raises `cause` when they do not."""
        if self._layout is not layout:  # another thread has looked already
            return self._layout
        manifest = read_manifest(self._folder)
        if manifest.shards == layout.manifest.shards or manifest.content_hash != layout.manifest.content_hash:
            raise cause
        self._layout = present_layout(self._folder, manifest, self._verify, self._cache_bytes)
        return self._layout


def _record_batches(index: RowIndex) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Shard, number and rows (positions in the index, in stored order) of each record batch that has any."""
    order = np.lexsort((index.rows, index.batches, index.shards))
    starts = np.flatnonzero(np.diff(index.shards[order], prepend=-1) | np.diff(index.batches[order], prepend=-1))
    for places in np.split(order, starts[1:]) if len(order) else ():
        yield int(index.shards[places[0]]), int(index.batches[places[0]]), places


def present_layout(folder: Folder, manifest: Manifest, verify: bool, cache_bytes: int) -> Layout:
    """The layout of a manifest or, when a compaction has replaced that one meanwhile, of the present one.

    Raises:
        MissingShardError: the index is gone although the manifest still names it.
    """
    while True:
        try:
            return Layout(folder, manifest, verify, cache_bytes)
        except MissingShardError:
            newer = read_manifest(folder)
            if newer.index == manifest.index:
                raise
            manifest = newer
