"""Unaccepted tails over a key-value cache: the layout and the attention of collecting.

Where the responses are known, a block's tail is a branch off a clean stream. It stands at its natural place: its keys
and values are written over the clean stream's own at the same positions, each query sees the slots up to its own, and
afterwards the clean ones are put back. So a branch needs neither slots of its own nor a mask over them, and its keys
end where the block does. Blocks with the same number in their responses (a column) begin at nearly the same slot in
every row, so a column is one attention call over a prefix of the cache, taken as it lies. Where few rows of a column
are left, their cache rows are gathered, and all such blocks share one call.

Where the responses are written in the same forwards, each row has one tail, behind all that it has accepted; what the
next forward does not keep, it overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from jf_cluster.jacobi.cache import KeyValueCache, aligned

IntArray = NDArray[np.int64]
Tensor = torch.Tensor

DENSE_SHARE = 0.5
"""From this share of active rows on, a column is attended to in place; the others are computed for nothing."""

GROUP_ROWS = 8
"""Rows of one call where each has one tail, on a CPU: the kernel is faster at few rows than at 64 (keys and values stay
in the processor's cache), and fewer queries are padding. A GPU takes all rows in one call."""


@dataclass(frozen=True)
class TailGroup:
    """Tokens of several blocks, no two of them in one row of keys; R rows of keys, at most Q tokens in one, t in all.

    ``heads`` query heads share a key-value head; they are laid one after the other along the queries.
    """

    tokens: slice
    """Where the group's tokens lie in the forward."""
    fill: Tensor
    """Index among the forward's (token, head) pairs of each padded query, int64 [R * G * heads * Q]."""
    pick: Tensor
    """Index among the padded answers, laid out [R, heads * Q, G], of each (token, head) pair, int64 [t * H]."""
    own: Tensor
    """Where each (token, key-value head) pair is written among all slots of all rows of keys, int64 [t * G]."""
    first_row: int
    """First of the R cache rows used in place."""
    gathered: Tensor | None
    """Cache rows to copy instead, int64 [R]; the copies are written to, and nothing is to be put back."""
    bias: Tensor
    """0 where a query sees a slot, else minus infinity; [R, 1, heads * Q, reach]."""


@dataclass(frozen=True)
class Tails:
    """One forward's tokens, sorted by group."""

    cache: KeyValueCache
    groups: tuple[TailGroup, ...]
    put_back: bool
    """Whether groups lie over clean streams: those used in place run from the last column to the first, and afterwards
    the clean keys and values are put back. Otherwise all are used in place and none sees another's rows."""

    @cached_property
    def fill(self) -> Tensor:
        return torch.cat([g.fill for g in self.groups])

    @cached_property
    def own(self) -> Tensor:
        return torch.cat([g.own for g in self.groups])


def lay_out_rows(cache: KeyValueCache, row: IntArray, slot: IntArray, heads: int) -> Tails:
    """Lay out one tail a row, at any slots; ``row`` (ascending) and ``slot`` are int64 [T], in the forward's order."""
    size = GROUP_ROWS if cache.keys[0].device.type == "cpu" else cache.rows
    edges = [0, *(np.flatnonzero(np.diff(row // size)) + 1).tolist(), len(row)]
    spans = [slice(*pair) for pair in pairwise(edges)]
    groups = tuple(_group(cache, span, row[span], slot[span], row[span], heads, True) for span in spans)
    return Tails(cache, groups, put_back=False)


def lay_out(
    cache: KeyValueCache, column: IntArray, row: IntArray, slot: IntArray, block: IntArray, heads: int
) -> tuple[Tails, IntArray]:
    """Group the tokens of a forward.

    Args:
        column: number of its block in the response, int64 [T], descending.
        row: cache row, int64 [T], ascending within a column.
        slot: position in the stream, int64 [T], ascending within a block.
        block: any number that tells blocks apart, int64 [T].
        heads: query heads that share a key-value head.

    Returns:
        The layout, and the order the tokens must be forwarded in (indices into the arguments, int64 [T]).
    """
    edges = np.flatnonzero(np.diff(column)) + 1
    dense: list[IntArray] = []
    sparse: list[IntArray] = []
    for part in np.split(np.arange(len(column)), edges):
        rows = np.unique(row[part])
        (dense if len(rows) >= DENSE_SHARE * (rows[-1] - rows[0] + 1) else sparse).append(part)
    order, groups, begin = [], [], 0
    # Gathered rows first: they must be copied before anything is written over the clean stream.
    together = [(np.concatenate(sparse), False)] if sparse else []
    for part, in_place in [*together, *((part, True) for part in dense)]:
        span = slice(begin, begin + len(part))
        groups.append(_group(cache, span, row[part], slot[part], block[part], heads, in_place))
        order.append(part)
        begin = span.stop
    return Tails(cache, tuple(groups), put_back=True), np.concatenate(order)


def _group(
    cache: KeyValueCache, tokens: slice, row: IntArray, slot: IntArray, block: IntArray, heads: int, in_place: bool
) -> TailGroup:
    device, dtype, shared = cache.keys[0].device, cache.keys[0].dtype, cache.keys[0].shape[1]
    begins = np.flatnonzero(np.concatenate([[True], np.diff(block) != 0]))
    rank = np.arange(len(row)) - np.repeat(begins, np.diff(np.append(begins, len(row))))
    own_row = row - row[0] if in_place else np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(row))))
    rows, width, reach = int(own_row[-1]) + 1, int(rank.max()) + 1, aligned(int(slot.max()) + 1)
    # Every query head of every token: which shared head it belongs to, and which of those `heads` it is.
    group, head = np.divmod(np.arange(shared * heads), heads)
    pair = np.arange(tokens.start, tokens.stop)[:, None] * (shared * heads) + np.arange(shared * heads)
    fill = np.zeros((rows, shared, heads, width), dtype=np.int64)
    fill[own_row[:, None], group, head, rank[:, None]] = pair
    pick = ((own_row[:, None] * heads + head) * width + rank[:, None]) * shared + group
    rows_of_keys, slots = (row, cache.slots) if in_place else (own_row, reach)
    own = (rows_of_keys[:, None] * shared + np.arange(shared)) * slots + slot[:, None]
    last = np.zeros((rows, width), dtype=np.int64)  # Padding sees slot 0: a softmax over nothing is not a number.
    last[own_row, rank] = slot
    bias = np.where(np.arange(reach) <= last[:, :, None], np.float32(0), np.float32(-np.inf))
    bias = np.tile(bias[:, None], (1, 1, heads, 1))

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(array.ravel()).to(device)

    return TailGroup(
        tokens,
        tensor(fill),
        tensor(pick),
        tensor(own),
        int(row[0]),
        None if in_place else tensor(row[begins]),
        torch.from_numpy(bias).to(device, dtype),
    )


def attend_tails(layer: int, query: Tensor, key: Tensor, value: Tensor, tails: Tails, scaling: float) -> Tensor:
    """Attention of one layer; [1, H, T, D] and twice [1, G, T, D] -> [1, T, H, D]."""
    heads, total, depth = query.shape[1:]
    queries, *own = (x[0].transpose(0, 1).reshape(-1, depth) for x in (query, key, value))
    caches = [tails.cache.keys[layer], tails.cache.values[layer]]
    shared = key.shape[1]
    if not tails.put_back:
        for cache, new in zip(caches, own, strict=True):
            cache.view(-1, depth).index_copy_(0, tails.own, new)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    out = query.new_empty(total * heads, depth)
    padded = torch.split(queries.index_select(0, tails.fill), [len(g.fill) for g in tails.groups])
    for group, folded in zip(tails.groups, padded, strict=True):
        rows, reach = group.bias.shape[0], group.bias.shape[3]
        begin, end = group.tokens.start, group.tokens.stop
        sources = []
        for cache, new in zip(caches, own, strict=True):
            if group.gathered is None:
                flat, source = cache.view(-1, depth), cache[group.first_row : group.first_row + rows, :, :reach]
            else:
                source = cache[:, :, :reach].index_select(0, group.gathered)
                flat = source.view(-1, depth)
            if tails.put_back:
                if group.gathered is None:
                    kept.append((flat, group.own, flat.index_select(0, group.own)))
                flat.index_copy_(0, group.own, new[begin * shared : end * shared])
            sources.append(source)
        answers = scaled_dot_product_attention(
            folded.view(rows, shared, -1, depth), sources[0], sources[1], attn_mask=group.bias, scale=scaling
        )
        # On a CPU the answers lie in memory as this takes them.
        laid = answers.transpose(1, 2).reshape(-1, depth)
        torch.index_select(laid, 0, group.pick, out=out[begin * heads : end * heads])
    for flat, slots, clean in kept:
        flat.index_copy_(0, slots, clean)
    return out.view(1, total, heads, depth)
