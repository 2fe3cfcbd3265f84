"""The order samples are read in: pure functions, the same on every machine and for every world size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def global_order(count: int, seed: int, epoch: int) -> Rows:
    """A permutation of `count` row numbers, int64 [count], that depends on nothing but its arguments.

    Counter-based (Philox), so two epochs or two seeds share nothing.
    """
    if count < 0 or epoch < 0 or seed < 0:
        raise ValueError(f"count, seed and epoch must not be negative, got {count}, {seed}, {epoch}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    # Sorting random keys instead of Generator.permutation: its algorithm is not promised to stay the same.
    keys = generator.bit_generator.random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def order_windows(count: int, seed: int, epoch: int, window: int) -> Iterator[Rows]:
    """The global order in pieces of `window` rows: what is packed together, and what a follower waits for together."""
    order = global_order(count, seed, epoch)
    return (order[begin : begin + window] for begin in range(0, count, window))


def step_bounds(
    lengths: npt.NDArray[np.integer], *, samples: int | None = None, tokens: int | None = None, start: int = 0
) -> Iterator[tuple[int, int]]:
    """Cut a sequence of rows into steps, each the half-open range of its places, from place `start` on.

    A step ends when it has `samples` rows or when the next row would take it past `tokens` (a longer row makes a step
    of its own). It knows nothing of ranks: the steps are the same for every world size.

    Args:
        lengths: tokens of each row, in reading order, [N].
    """
    if samples is None and tokens is None:
        raise ValueError("give samples, tokens or both: a step needs an end")
    if (samples is not None and samples < 1) or (tokens is not None and tokens < 1):
        raise ValueError(f"samples and tokens must be positive, got {samples} and {tokens}")
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    count = len(lengths)
    while start < count:
        stop = count if samples is None else min(count, start + samples)
        if tokens is not None:
            fitting = int(np.searchsorted(ends, ends[start] + tokens, side="right")) - 1
            stop = min(stop, max(start + 1, fitting))
        yield start, stop
        start = stop


def balanced_shares(lengths: npt.NDArray[np.integer], world_size: int) -> list[Rows]:
    """Places of a step's rows for each rank, near-equal in tokens; within a rank in reading order.

    The longest row goes to the rank with fewest tokens, then the next (LPT: no rank exceeds 4/3 of the best possible).
    A step with at least `world_size` rows leaves no rank empty.

    Args:
        lengths: tokens of each row of the step, positive, [n].
    """
    if world_size < 1:
        raise ValueError(f"world_size must be positive, got {world_size}")
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for place in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        rank = min(range(world_size), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(place)
        loads[rank] += int(lengths[place])
    return [np.array(sorted(share), np.int64) for share in shares]
