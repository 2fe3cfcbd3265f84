"""The global order: a permutation that is the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from trajectory_store import global_order


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_it_is_a_permutation(count: int) -> None:
    order = global_order(count, seed=3, epoch=0)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))


def test_it_depends_on_seed_and_epoch_only() -> None:
    order = global_order(100, seed=3, epoch=1)
    assert np.array_equal(order, global_order(100, seed=3, epoch=1))
    assert not np.array_equal(order, global_order(100, seed=3, epoch=2))
    assert not np.array_equal(order, global_order(100, seed=4, epoch=1))


def test_it_does_not_change_between_versions() -> None:
    """A saved position is worth nothing if the order it counts in changes."""
    assert global_order(10, seed=0, epoch=0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def test_negative_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        global_order(-1, 0, 0)
