"""Trajectories to store: random but seeded, valid, with every iterate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from trajectory_store import Provenance, Round, Trajectory, TrajectoryStore
from trajectory_store.trajectory import block_lengths

BLOCK_SIZE = 8


def make_provenance(**changes: object) -> Provenance:
    """A provenance of round 1, fields replaced as asked."""
    values: dict[str, object] = {
        "model_hash": "m0",
        "tokenizer_hash": "t0",
        "block_size": BLOCK_SIZE,
        "seed": 7,
        "round_number": 1,
        "code_version": "test",
        "config": {"collect": {"workers": 2}},
    }
    return Provenance(**(values | changes))  # type: ignore[arg-type]


def make_trajectory(
    prompt_id: str, seed: int = 0, response_tokens: int | None = None, block_size: int = BLOCK_SIZE
) -> Trajectory:
    """A valid trajectory whose tokens depend on the id and the seed alone."""
    rng = np.random.default_rng([seed, *prompt_id.encode()])
    tokens = int(rng.integers(0, 60)) if response_tokens is None else response_tokens
    response = rng.integers(0, 512, tokens, dtype=np.int32)
    lengths = block_lengths(tokens, block_size)
    iterations, accepted, tails = [], [], [np.zeros(0, np.int32)]
    for length in lengths.tolist():
        steps = np.unique(rng.integers(0, length, int(rng.integers(0, length + 1))))
        iterations.append(len(steps))
        accepted.extend(steps.tolist())
        tails.extend(rng.integers(0, 512, length - step, dtype=np.int32) for step in steps.tolist())
    return Trajectory(
        prompt_id=prompt_id,
        prompt=rng.integers(0, 512, int(rng.integers(1, 30)), dtype=np.int32),
        response=response,
        finished=bool(rng.integers(0, 2)),
        iterations=np.array(iterations, np.int32),
        accepted=np.array(accepted, np.int32),
        tails=np.concatenate(tails),
    )


def memory_folder() -> str:
    """A temporary folder in memory where there is one, for tests that would flush to disk thousands of times."""
    memory = Path("/dev/shm")
    return tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)


@pytest.fixture
def provenance() -> Provenance:
    return make_provenance()


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore(tmp_path / "store")


@pytest.fixture
def round_(store: TrajectoryStore) -> Iterator[Round]:
    yield store.round(1)
