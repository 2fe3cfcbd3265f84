"""One Ray for all tests of training, a minuscule model, and sealed rounds of made-up trajectories."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.config import Config
from jf_cluster.models import load_tokenizer, model_hash, tokenizer_hash
from jf_cluster.train.worker import RankJob, run_rank
from trajectory_store import Provenance, Trajectory, TrajectoryStore

VOCABULARY, BLOCK = 64, 8

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="jf-", ignore_cleanup_errors=True) as directory:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=directory
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2 layers of 32 that knows nothing, and a tokenizer of 64 words."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(directory)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1", pad_token="w0").save_pretrained(
        directory
    )
    return directory


@pytest.fixture
def configured(base: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make a configuration; keyword arguments are settings of ``train``."""

    def make(name: str = "run", **train: Any) -> Config:
        settings = {
            "steps": 6,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "micro_batch_tokens": 200,
            "loss_chunk_tokens": 24,  # several chunks a micro-batch, and not as many on every rank
            "checkpoint_every_steps": 2,
            "zero": {"persistence_threshold": 0},
        }
        return Config.model_validate(
            {
                "name": name,
                "runs_dir": tmp_path / "runs",
                "store": str(tmp_path / "store"),
                "model": {"path": str(base)},
                "noise": {"window": 3},
                "train": settings | train,
            }
        )

    return make


def trajectories(count: int, seed: int = 0) -> Iterator[Trajectory]:
    """Valid trajectories of random tokens."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        length = int(rng.integers(20, 50))
        prompt = rng.integers(2, VOCABULARY, int(rng.integers(4, 12)), dtype=np.int32)
        response = rng.integers(2, VOCABULARY, length, dtype=np.int32)
        response[-1] = 1
        iterations, accepted, tails = [], [], []
        for start in range(0, length, BLOCK):
            width = min(BLOCK, length - start)
            prefixes = np.sort(rng.choice(width, int(rng.integers(1, width + 1)), replace=False))
            iterations.append(len(prefixes))
            for prefix in prefixes:
                tail = rng.integers(2, VOCABULARY, width - prefix)
                tail[0] = 2 + (response[start + prefix] - 1) % (VOCABULARY - 2)  # any token but the accepted one
                accepted.append(prefix)
                tails.extend(tail)
        arrays = (np.array(values, dtype=np.int32) for values in (iterations, accepted, tails))
        yield Trajectory(f"prompt-{number:04d}", prompt, response, True, *arrays)


def seal(config: Config, round_number: int = 1, count: int = 24, made_by: str | None = None) -> None:
    """Write and seal a round as if the model before it had made it."""
    provenance = Provenance(
        model_hash=made_by or model_hash(config.model_dir(round_number - 1)),
        tokenizer_hash=tokenizer_hash(load_tokenizer(config)),
        block_size=BLOCK,
        seed=config.seed,
        round_number=round_number,
        code_version="test",
        config={},
    )
    trajectory_round = TrajectoryStore(config.store_url).round(round_number)
    with trajectory_round.writer(provenance, writer_id="test") as writer:
        for trajectory in trajectories(count):
            writer.append(trajectory)
    trajectory_round.seal(provenance)


def job_of(config: Config, directory: Path, identity: str = "test") -> RankJob:
    """A rank's job that keeps everything under ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    return RankJob(
        config_json=config.model_dump_json(),
        round_number=1,
        identity=identity,
        checkpoints=str(directory / "checkpoints"),
        steps_log=str(directory / "steps.jsonl"),
        skipped_steps=str(directory / "skipped.jsonl"),
        export=str(directory / "export"),
    )


def _as_rank(rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"JF_INIT_METHOD": f"file://{meeting}", "GLOO_SOCKET_IFNAME": "lo"}
    return function(*arguments)


class Ranks:
    """Two processes that act as one or two ranks and stay: DeepSpeed is imported once for many trainings."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._meetings = directory, 0
        context = multiprocessing.get_context("spawn")
        self._processes = [ProcessPoolExecutor(max_workers=1, mp_context=context) for _ in range(2)]

    def call(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """What ``function`` gives on each of ``world_size`` ranks."""
        self._meetings += 1
        meeting = str(self._directory / f"meeting-{self._meetings}")
        calls = [
            process.submit(_as_rank, rank, world_size, meeting, function, arguments)
            for rank, process in enumerate(self._processes[:world_size])
        ]
        done, _ = wait(calls, timeout=300, return_when=FIRST_EXCEPTION)
        for call in done:  # the others may be waiting for a rank that failed
            call.result()
        return [call.result(timeout=10) for call in calls]

    def train(self, job: RankJob, world_size: int) -> None:
        self.call(run_rank, world_size, job)

    def close(self) -> None:
        for process in self._processes:
            for child in list(process._processes.values()):
                child.kill()  # one that waits for a rank that failed would never end by itself
            process.shutdown()


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
