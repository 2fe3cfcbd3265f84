"""What a trajectory says and which ones are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.store.conftest import make_trajectory
from trajectory_store import InvalidTrajectoryError, Trajectory
from trajectory_store.trajectory import digest, normalised


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture
def two_blocks() -> Trajectory:
    """Blocks [10 11 12] and [13 14] of size 3; 2 and 1 iterations."""
    return Trajectory(
        prompt_id="p",
        prompt=int32(1, 2),
        response=int32(10, 11, 12, 13, 14),
        finished=True,
        iterations=int32(2, 1),
        accepted=int32(1, 2, 0),
        tails=int32(91, 92, 93, 94, 95),
    )


def test_iterates_are_prefix_plus_tail(two_blocks: Trajectory) -> None:
    assert two_blocks.block_lengths(3).tolist() == [3, 2]
    assert two_blocks.iterate(0, 0, 3).tolist() == [10, 91, 92]
    assert two_blocks.iterate(0, 1, 3).tolist() == [10, 11, 93]
    assert two_blocks.iterate(0, 2, 3).tolist() == [10, 11, 12]
    assert two_blocks.iterate(1, 0, 3).tolist() == [94, 95]
    assert two_blocks.iterate(1, 1, 3).tolist() == [13, 14]


@pytest.mark.parametrize(("block", "k"), [(0, 3), (0, -1), (2, 0), (-1, 0)])
def test_no_such_iterate(two_blocks: Trajectory, block: int, k: int) -> None:
    with pytest.raises(IndexError):
        two_blocks.iterate(block, k, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_id": ""}, "prompt id"),
        ({"prompt_id": "x" * 2000}, "prompt id"),
        ({"prompt_id": "\ud800"}, "UTF-8"),
        ({"iterations": int32(2)}, "blocks"),
        ({"iterations": int32(4, -1)}, "negative iterations"),
        ({"accepted": int32(1, 2)}, "accepted has 2"),
        ({"accepted": int32(1, 3, 0)}, "not shorter"),
        ({"accepted": int32(1, -1, 0)}, "negative"),
        ({"tails": int32(1)}, "tails has 1"),
        ({"prompt": int32(-5)}, "negative token"),
        ({"prompt": np.array([0.5])}, "integers"),
        ({"prompt": np.array([[1]])}, "one-dimensional"),
        ({"prompt": np.array([2**40])}, "fit int32"),
    ],
)
def test_contradictions_are_named(two_blocks: Trajectory, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidTrajectoryError, match=message):
        normalised(replace(two_blocks, **changes), 3)  # type: ignore[arg-type]


def test_digest_is_of_the_content(two_blocks: Trajectory) -> None:
    same = replace(two_blocks, prompt=np.array([1, 2], np.int64))
    assert digest(normalised(same, 3)) == digest(normalised(two_blocks, 3))
    # Moving a token from one array to the next must not go unnoticed.
    moved = replace(two_blocks, prompt=int32(1), response=int32(2, 10, 11, 12, 13, 14))
    assert digest(moved) != digest(two_blocks)
    assert digest(replace(two_blocks, finished=False)) != digest(two_blocks)


def test_random_trajectories_are_valid() -> None:
    for seed in range(50):
        trajectory = make_trajectory(f"p{seed}", seed)
        assert normalised(trajectory, 8) == trajectory
