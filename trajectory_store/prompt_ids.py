"""Sets of prompt ids that may be of tens of millions: text in Arrow's layout, a quarter of what a Python set takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

S = TypeVar("S")


class PromptIds(Set[str]):
    """A set of prompt ids. Asking for many ids at once (``mask``) is fast; one by one each takes a search.

    Ids are kept apart by their last byte, so that a hash table made on the way is one of a small part.
    """

    def __init__(self, chunks: Iterable[pa.Array]) -> None:
        found: dict[int, list[pa.Array]] = {}
        for chunk in chunks:
            for byte, places in _by_last_byte(chunk.cast(pa.large_string())):
                found.setdefault(byte, []).append(chunk.take(places).cast(pa.large_string()))
        # One after the other, so that not everything is there twice.
        self._parts = {byte: pc.unique(pa.chunked_array(found.pop(byte))) for byte in sorted(found)}

    @classmethod
    def _from_iterable(cls, it: Iterable[S]) -> Set[S]:
        return set(it)  # what operators such as | give

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def __iter__(self) -> Iterator[str]:
        return (prompt_id for part in self._parts.values() for prompt_id in part.to_pylist())

    def __contains__(self, prompt_id: object) -> bool:
        return isinstance(prompt_id, str) and bool(self.mask(pa.array([prompt_id], pa.large_string()))[0])

    def __repr__(self) -> str:
        return repr(set(self)) if len(self) <= 20 else f"<{len(self)} prompt ids>"

    def mask(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        """Whether each of `ids` is in the set, bool [N]."""
        ids = ids.cast(pa.large_string())
        found = np.zeros(len(ids), bool)
        for byte, places in _by_last_byte(ids):
            if byte in self._parts:
                here = pc.is_in(ids.take(places), value_set=self._parts[byte])
                found[places.to_numpy()] = here.to_numpy(zero_copy_only=False)
        return found


def _by_last_byte(ids: pa.LargeStringArray) -> Iterator[tuple[int, pa.Array]]:
    """Yield each last byte that occurs, with the places of its ids; of an empty id the byte is 0."""
    if len(ids) == 0:
        return
    _, offsets, data = ids.buffers()
    ends = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    content = np.frombuffer(data, np.uint8) if data is not None and len(data) else np.zeros(1, np.uint8)
    last = np.where(ends[1:] > ends[:-1], content[ends[1:] - 1], 0)
    for byte in np.flatnonzero(np.bincount(last)).tolist():
        yield byte, pa.array(np.flatnonzero(last == byte))
