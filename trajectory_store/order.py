"""The order samples are read in: pure functions, the same on every machine and for every world size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def global_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of `count` row numbers, int64 [count], that depends on nothing but its arguments.

    Counter-based (Philox), so two epochs or two seeds share nothing.
    """
    if count < 0 or epoch < 0 or seed < 0:
        raise ValueError(f"count, seed and epoch must not be negative, got {count}, {seed}, {epoch}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    # Sorting random keys instead of Generator.permutation: its algorithm is not promised to stay the same.
    keys = generator.bit_generator.random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
