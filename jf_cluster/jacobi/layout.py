"""The one attention pattern: stems (clean causal sequences) with branches hanging off them.

A token of a stem attends to its stem up to itself. A token of a branch that starts at stem position ``s`` attends
to the stem's positions below ``s`` and to its own branch up to itself, and carries position ``s``, ``s + 1``, …
So the keys a query sees are always two ranges, which is what ``visible`` (the dense oracle) says in one line.

Collecting, training and decoding are three uses of this pattern. Here live the flat form, stems and branches in one
sequence (``Forest``, training), and the cached form, stems in a key-value cache (``CachedRows``, collecting and
decoding). How attention is computed over them is in ``attention.py``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from jf_cluster.jacobi.cache import KeyValueCache

IntArray = NDArray[np.int64]


def visible(
    stem_begin: torch.Tensor, stem_end: torch.Tensor, own_begin: torch.Tensor, own_end: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """The dense oracle: True where a query may see a key.

    All arguments are int64 and broadcast against each other: a query sees key slots ``stem_begin <= k < stem_end``
    and ``own_begin <= k <= own_end``, where ``own_end`` is the query's own slot.
    """
    return ((keys >= stem_begin) & (keys < stem_end)) | ((keys >= own_begin) & (keys <= own_end))


@dataclass(frozen=True)
class Branch:
    """A branch of ``length`` tokens off stem number ``stem``, its first token at stem position ``start``."""

    stem: int
    start: int
    length: int


STRETCH_TOKENS = 48
"""Query tokens of a piece. Fewer make calls too small for a processor, more compute scores that nobody sees."""

Spans = tuple[slice, ...]
"""Parts of a forest's flat sequence."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a forest that are attended to together: a stretch of a stem and the branches that begin in it.

    Where those are many, they are pieces of their own; a long branch is cut into stretches as a stem is.
    """

    queries: Spans
    keys: Spans
    """Whatever any of the queries sees."""
    bias: torch.Tensor
    """0 where a query sees a key, else minus infinity; float32 [heads * Q, K].

    The query heads that share a key-value head lie one below the other.
    """


def take(flat: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Tokens of some spans, one after the other: [B, H, T, D] -> [B, H, Q, D]."""
    return flat[:, :, spans[0]] if len(spans) == 1 else torch.cat([flat[:, :, span] for span in spans], 2)


def spread(taken: torch.Tensor, spans: Spans) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each span with its part of what ``take`` joined."""
    return zip(spans, torch.split(taken, [span.stop - span.start for span in spans], dim=2), strict=True)


def _runs(offsets: list[int]) -> Iterator[slice]:
    """Neighbouring branches of STRETCH_TOKENS together, or a longer one alone; from where each begins, and the end."""
    begin = 0
    for index in range(1, len(offsets)):
        if index == len(offsets) - 1 or offsets[index + 1] - offsets[begin] > STRETCH_TOKENS:
            yield slice(offsets[begin], offsets[index])
            begin = index


@dataclass(frozen=True)
class Forest:
    """Stems and their branches as one flat sequence: all stems first, then all branches, without padding.

    Raises:
        ValueError: a branch that does not hang off its stem, or branches not in the order in which they begin.
    """

    stem_lengths: tuple[int, ...]
    branches: tuple[Branch, ...]
    device: torch.device = field(default=torch.device("cpu"))

    def __post_init__(self) -> None:
        for b in self.branches:
            if not 0 < b.start <= self.stem_lengths[b.stem] or b.length < 1:
                raise ValueError(f"{b} does not hang off a stem of {self.stem_lengths[b.stem]} tokens")
        if any((a.stem, a.start) > (b.stem, b.start) for a, b in pairwise(self.branches)):
            raise ValueError("branches must come in the order of their stems and of their beginnings there")

    def to(self, device: torch.device) -> Forest:
        return self if device == self.device else Forest(self.stem_lengths, self.branches, device)

    @cached_property
    def stem_offsets(self) -> IntArray:
        """Flat index of each stem's first token, and the total of all stems at the end; [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.stem_lengths, dtype=np.int64)])

    @cached_property
    def branch_offsets(self) -> IntArray:
        """Flat index of each branch's first token, and the length of the whole sequence at the end; [R + 1]."""
        lengths = np.array([b.length for b in self.branches], dtype=np.int64)
        offsets: IntArray = self.stem_offsets[-1] + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return offsets

    @property
    def total_tokens(self) -> int:
        return int(self.branch_offsets[-1])

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Rotary positions, int64 [1, T]."""
        parts = [np.arange(n) for n in self.stem_lengths] + [b.start + np.arange(b.length) for b in self.branches]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)[None]

    @cached_property
    def ranges(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(stem_begin, stem_end, own_begin, own_end)`` of every token, int64 [T] each."""
        begin, end, own = (np.zeros(self.total_tokens, dtype=np.int64) for _ in range(3))
        for first, length in zip(self.stem_offsets[:-1], self.stem_lengths, strict=True):
            own[first : first + length] = first
        for first, b in zip(self.branch_offsets[:-1], self.branches, strict=True):
            span = slice(first, first + b.length)
            begin[span] = self.stem_offsets[b.stem]
            end[span] = self.stem_offsets[b.stem] + b.start
            own[span] = first
        stem_begin, stem_end, own_begin = (torch.from_numpy(a).to(self.device) for a in (begin, end, own))
        return stem_begin, stem_end, own_begin, torch.arange(len(own), device=self.device)

    @cached_property
    def dense_mask(self) -> torch.Tensor:
        """Who sees whom, bool [1, 1, T, T] (the oracle)."""
        begin, end, own_begin, own_end = (r[:, None] for r in self.ranges)
        return visible(begin, end, own_begin, own_end, torch.arange(self.total_tokens, device=self.device))[None, None]

    def pieces(self, heads: int) -> tuple[Piece, ...]:
        """Everything in pieces, for a model where so many query heads share a key-value head; cut once."""
        kept: dict[int, tuple[Piece, ...]] = self.__dict__.setdefault("_pieces", {})
        if heads not in kept:
            kept[heads] = tuple(self._cut(heads))
        return kept[heads]

    def _cut(self, heads: int) -> Iterator[Piece]:
        """A piece for every stretch with the first run of branches that begin in it; more where the run is long."""
        starts, offsets = [(b.stem, b.start) for b in self.branches], self.branch_offsets.tolist()
        for stem, (first, length) in enumerate(zip(self.stem_offsets[:-1].tolist(), self.stem_lengths, strict=True)):
            for begin in range(0, length, STRETCH_TOKENS):
                end = min(begin + STRETCH_TOKENS, length)
                stretch, seen = slice(first + begin, first + end), slice(first, first + end)
                index, after = bisect_right(starts, (stem, begin)), bisect_right(starts, (stem, end))
                runs = list(_runs(offsets[index : after + 1]))
                near = [runs.pop(0)] if runs and runs[0].stop - runs[0].start <= STRETCH_TOKENS else []
                yield self._piece((stretch, *near), (seen, *near), heads)
                for run in runs:
                    for at in range(run.start, run.stop, STRETCH_TOKENS):
                        until = min(at + STRETCH_TOKENS, run.stop)
                        yield self._piece((slice(at, until),), (seen, slice(run.start, until)), heads)

    def _piece(self, queries: Spans, keys: Spans, heads: int) -> Piece:
        query, key = (
            torch.cat([torch.arange(span.start, span.stop, device=self.device) for span in spans])
            for spans in (queries, keys)
        )
        stem_begin, stem_end, own_begin, own_end = (r[query, None] for r in self.ranges)
        seen = visible(stem_begin, stem_end, own_begin, own_end, key)
        bias = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, -torch.inf)
        return Piece(queries, keys, bias.repeat(heads, 1))

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask as FlexAttention takes it."""
        begin, end, own, _ = self.ranges

        def allowed(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return visible(begin[q], end[q], own[q], q, k)

        return create_block_mask(allowed, None, None, self.total_tokens, self.total_tokens, device=str(self.device))

    @cached_property
    def stem_sequences(self) -> Sequences:
        """The stems for a variable-length kernel: queries and keys alike."""
        offsets, longest = torch.from_numpy(self.stem_offsets).to(self.device), max(self.stem_lengths)
        cumulative = offsets.to(torch.int32)
        return Sequences(cumulative, cumulative, longest, longest, torch.arange(int(offsets[-1]), device=self.device))

    @cached_property
    def branch_sequences(self) -> Sequences:
        """The branches for a variable-length kernel: a branch's keys are its stem prefix followed by itself."""
        firsts = self.branch_offsets[:-1]
        gather = [
            np.concatenate([self.stem_offsets[b.stem] + np.arange(b.start), first + np.arange(b.length)])
            for first, b in zip(firsts, self.branches, strict=True)
        ]
        key_ends = np.concatenate([[0], np.cumsum([len(g) for g in gather])])
        query_ends = self.branch_offsets - self.branch_offsets[0]
        return Sequences(
            torch.from_numpy(query_ends).to(self.device, torch.int32),
            torch.from_numpy(key_ends).to(self.device, torch.int32),
            max(b.length for b in self.branches),
            max(map(len, gather)),
            torch.from_numpy(np.concatenate(gather)).to(self.device),
        )


@dataclass(frozen=True)
class Sequences:
    """What a variable-length attention kernel needs: cumulative lengths (int32) and the longest of each side."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    gather: torch.Tensor
    """Flat index of every key, int64."""


@dataclass(frozen=True)
class CachedRows:
    """Query tokens over stems that lie in a key-value cache: row b of the queries belongs to cache row first_row + b.

    The tokens' own keys and values are first written to the cache, then each query attends to what ``mask`` allows
    among the first ``reach`` slots. ``fill`` carries flat tokens to padded rows and ``pick`` brings them back; both are
    None where the model already computes on padded rows [B, Q].
    """

    cache: KeyValueCache
    write_rows: torch.Tensor | None
    """Cache row of every token the model computes on, int64 [T] (or [B * Q]); None where ``first_slot`` says it all."""
    write_slots: torch.Tensor | None
    """Cache slot of every such token, int64, same shape."""
    mask: torch.Tensor | None
    """[B, 1, Q, reach], bool (True: sees) or in the queries' dtype (added); None where every query sees all of it."""
    reach: int
    fill: torch.Tensor | None = None
    """Flat index of each padded query, int64 [B, Q]."""
    pick: torch.Tensor | None = None
    """Index into the padded queries of each flat token, int64 [T]."""
    causal: bool = False
    """The queries are whole stems from slot 0 on; ``mask`` is then None."""
    first_row: int = 0
    first_slot: int | None = None
    """Every row's queries fill the slots from this one on: written as one block instead of token by token."""

    @staticmethod
    def of_stems(cache: KeyValueCache, lengths: IntArray) -> tuple[CachedRows, IntArray, IntArray]:
        """Lay out whole stems of so many tokens, one after the other without padding, over the rows of ``cache``.

        Returns:
            The layout, and each token's row and slot, int64 [T].
        """
        row = np.repeat(np.arange(len(lengths)), lengths)
        slot = np.concatenate([np.arange(n) for n in lengths])
        width = int(lengths.max())
        fill = np.zeros((len(lengths), width), dtype=np.int64)
        fill[row, slot] = np.arange(len(row))
        device = cache.keys[0].device
        rows, slots, filled, pick = (torch.from_numpy(a).to(device) for a in (row, slot, fill, row * width + slot))
        layout = CachedRows(cache, rows, slots, mask=None, reach=width, fill=filled, pick=pick, causal=True)
        return layout, row, slot

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """The mask as what is added to scores; made once, where SDPA on CPU would make it in every layer."""
        if self.mask is None or self.mask.is_floating_point():
            return self.mask
        dtype = self.cache.keys[0].dtype
        return torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device).masked_fill_(~self.mask, -torch.inf)

    def folded_bias(self, times: int) -> torch.Tensor | None:
        """``bias`` so many times below itself, [B, 1, times * Q, reach]."""
        if self.bias is None:
            return None
        kept: dict[int, torch.Tensor] = self.__dict__.setdefault("_folded", {})
        if times not in kept:
            kept[times] = self.bias.repeat(1, 1, times, 1)
        return kept[times]
