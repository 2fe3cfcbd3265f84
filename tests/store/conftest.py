"""Trajectories to store: random but seeded, valid, with every iterate."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sized
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
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


def wait_until_read(read: Sized, rows: int) -> None:
    """Until a background thread has read so many rows, and a moment longer, in which it might read too many."""
    deadline = time.monotonic() + 30
    while len(read) < rows and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.02)


def memory_folder() -> str:
    """A temporary folder in memory where there is one, for tests that would flush to disk thousands of times."""
    memory = Path("/dev/shm")
    return tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Host and port of a real S3-compatible server on loopback."""
    moto_server = pytest.importorskip("moto.server", reason="needs the dev extra: moto[server]")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in a bucket of its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = "b" + "".join(c for c in request.node.name.lower() if c.isalnum())[:50]
    query = f"scheme=http&endpoint_override={s3_endpoint}&region=us-east-1&allow_bucket_creation=true"
    filesystem, path = pafs.FileSystem.from_uri(f"s3://{bucket}?{query}")
    filesystem.create_dir(path)
    return f"s3://{bucket}/runs/store?{query}"


@pytest.fixture
def s3(s3_url: str) -> Round:
    """Round 1 of a store on S3."""
    return TrajectoryStore(s3_url).round(1)


@pytest.fixture
def provenance() -> Provenance:
    return make_provenance()


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    return TrajectoryStore(tmp_path / "store")


@pytest.fixture
def round_(store: TrajectoryStore) -> Iterator[Round]:
    yield store.round(1)
