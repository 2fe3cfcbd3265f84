"""Tails of noisy blocks over clean streams in a key-value cache: the layout and the attention of collecting.

A block's unconverged tail stands at its natural place: its keys and values are written over the clean stream's own at
the same positions, each query sees the slots up to its own, and afterwards the clean ones are put back. So a branch
needs neither slots of its own nor a mask over them, and its keys end where the block does.

Blocks with the same number in their responses (a column) begin at nearly the same slot in every row, so a column is
one attention call over a prefix of the cache, taken as it lies. Where few rows of a column are left, their cache rows
are gathered, and all such blocks share one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from jf_cluster.jacobi.cache import KeyValueCache

IntArray = NDArray[np.int64]
Tensor = torch.Tensor

DENSE_SHARE = 0.5
"""From this share of active rows on, a column is attended to in place; the others are computed for nothing."""


@dataclass(frozen=True)
class TailGroup:
    """Tokens of several blocks, no two of them in one row of keys; R rows of keys, at most Q tokens in one, t in all.

    ``heads`` query heads share a key-value head; they are laid one after the other along the queries.
    """

    tokens: slice
    """Where the group's tokens lie in the forward."""
    fill: Tensor
    """Index within the group of each padded query, int64 [R * Q]."""
    pick: Tensor
    """Index into the padded queries of each token, int64 [t]."""
    own_rows: Tensor
    """Row of keys each token is written to, int64 [t]."""
    slots: Tensor
    """Slot it is written to, int64 [t]."""
    first_row: int
    """First of the R cache rows used in place."""
    gathered: Tensor | None
    """Cache rows to copy instead, int64 [R]; the copies are written to, and nothing is to be put back."""
    bias: Tensor
    """0 where a query sees a slot, else minus infinity; [R, 1, heads * Q, reach]."""


@dataclass(frozen=True)
class Tails:
    """One forward's tokens, sorted by group; groups used in place run from the last column to the first."""

    cache: KeyValueCache
    groups: tuple[TailGroup, ...]


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
    return Tails(cache, tuple(groups)), np.concatenate(order)


def _group(
    cache: KeyValueCache, tokens: slice, row: IntArray, slot: IntArray, block: IntArray, heads: int, in_place: bool
) -> TailGroup:
    device, dtype = cache.keys[0].device, cache.keys[0].dtype
    begins = np.flatnonzero(np.concatenate([[True], np.diff(block) != 0]))
    rank = np.arange(len(row)) - np.repeat(begins, np.diff(np.append(begins, len(row))))
    own_row = row - row[0] if in_place else np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(row))))
    rows, width, reach = int(own_row[-1]) + 1, int(rank.max()) + 1, int(slot.max()) + 1
    at = own_row * width + rank
    fill = np.zeros(rows * width, dtype=np.int64)
    fill[at] = np.arange(len(row))
    last = np.zeros(rows * width, dtype=np.int64)  # Padding sees slot 0: a softmax over nothing is not a number.
    last[at] = slot
    bias = np.where(np.arange(reach) <= last[:, None], np.float32(0), np.float32(-np.inf))
    bias = np.tile(bias.reshape(rows, 1, width, reach), (1, 1, heads, 1))

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return TailGroup(
        tokens,
        tensor(fill),
        tensor(at),
        tensor(own_row),
        tensor(slot),
        int(row[0]),
        None if in_place else tensor(row[begins]),
        torch.from_numpy(bias).to(device, dtype),
    )


def attend_tails(layer: int, query: Tensor, key: Tensor, value: Tensor, tails: Tails, scaling: float) -> Tensor:
    """Attention of one layer; [1, H, T, D] and twice [1, G, T, D] -> [1, T, H, D]."""
    queries, own = query[0].transpose(0, 1), [key[0].transpose(0, 1), value[0].transpose(0, 1)]
    caches = [tails.cache.keys[layer], tails.cache.values[layer]]
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    outs = []
    for group in tails.groups:
        rows, reach = group.bias.shape[0], group.bias.shape[3]
        sources = []
        for cache, new in zip(caches, own, strict=True):
            if group.gathered is None:
                source = cache[group.first_row : group.first_row + rows, :, :reach]
                kept.append((source, group.own_rows, group.slots, source[group.own_rows, :, group.slots]))
            else:
                source = cache[:, :, :reach].index_select(0, group.gathered)
            source[group.own_rows, :, group.slots] = new[group.tokens]
            sources.append(source)
        outs.append(_attend(queries[group.tokens], sources[0], sources[1], group, scaling))
    for source, row, slot, clean in kept:
        source[row, :, slot] = clean
    return torch.cat(outs)[None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, group: TailGroup, scaling: float) -> Tensor:
    """One group; [t, H, D], [R, G, reach, D] twice -> [t, H, D]."""
    rows, shared, _, depth = keys.shape
    heads, width = query.shape[1] // shared, group.bias.shape[2] // (query.shape[1] // shared)
    padded = query.index_select(0, group.fill).view(rows, width, shared, heads, depth)
    folded = padded.permute(0, 2, 3, 1, 4).reshape(rows, shared, heads * width, depth)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=group.bias, scale=scaling)
    unfolded = out.view(rows, shared, heads, width, depth).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(rows * width, shared * heads, depth).index_select(0, group.pick)
