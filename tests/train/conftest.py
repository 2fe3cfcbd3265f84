"""One Ray for all tests of training, a minuscule model, and sealed rounds of made-up trajectories."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.config import Config
from jf_cluster.models import load_tokenizer, model_hash, tokenizer_hash
from jf_cluster.tracking import Tracker
from jf_cluster.train.checkpoints import make_loadable, to_load
from jf_cluster.train.steps_log import read_steps
from jf_cluster.train.worker import RankJob, run_rank
from trajectory_store import Provenance, Trajectory, TrajectoryStore

VOCABULARY, BLOCK = 64, 8
BROKEN = VOCABULARY - 1

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback


@pytest.fixture(scope="package")
def ray_session() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="jf-", ignore_cleanup_errors=True) as directory:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=directory
        )
        yield
        ray.shutdown()


def save_base(directory: Path, broken_word: int | None = None) -> Path:
    """A model of 2 layers of 32 that knows nothing, and a tokenizer of 64 words.

    Whatever contains ``broken_word`` gives no finite loss, since the word's embedding is not a number.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=broken_word is None,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    if broken_word is not None:
        model.model.embed_tokens.weight.data[broken_word] = torch.nan
    model.save_pretrained(directory)
    words = WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1", pad_token="w0").save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def broken_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no prompt with the last word of the vocabulary is good for."""
    return save_base(tmp_path_factory.mktemp("broken"), broken_word=BROKEN)


@pytest.fixture
def configured(base: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make a configuration; keyword arguments are settings of ``train``."""

    def make(name: str = "run", model: Path = base, dtype: str = "float32", **train: Any) -> Config:
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
                "model": {"path": str(model), "dtype": dtype},
                "noise": {"window": 3},
                "train": settings | train,
            }
        )

    return make


def trajectories(count: int, seed: int = 0, broken: Collection[int] = ()) -> Iterator[Trajectory]:
    """Valid trajectories of random tokens; only the prompts numbered in ``broken``, if any, contain BROKEN."""
    rng = np.random.default_rng(seed)
    words = BROKEN if broken else VOCABULARY
    for number in range(count):
        length = int(rng.integers(20, 50))
        prompt = rng.integers(2, words, int(rng.integers(4, 12)), dtype=np.int32)
        if number in broken:
            prompt[0] = BROKEN
        response = rng.integers(2, words, length, dtype=np.int32)
        response[-1] = 1
        iterations, accepted, tails = [], [], []
        for start in range(0, length, BLOCK):
            width = min(BLOCK, length - start)
            prefixes = np.sort(rng.choice(width, int(rng.integers(1, width + 1)), replace=False))
            iterations.append(len(prefixes))
            for prefix in prefixes:
                tail = rng.integers(2, words, width - prefix)
                tail[0] = 2 + (response[start + prefix] - 1) % (words - 2)  # any token but the accepted one
                accepted.append(prefix)
                tails.extend(tail)
        arrays = (np.array(values, dtype=np.int32) for values in (iterations, accepted, tails))
        yield Trajectory(f"prompt-{number:04d}", prompt, response, True, *arrays)


def provenance(config: Config, round_number: int = 1, made_by: str | None = None) -> Provenance:
    """As if the model before the round had made it."""
    return Provenance(
        model_hash=made_by or model_hash(config.model_dir(round_number - 1)),
        tokenizer_hash=tokenizer_hash(load_tokenizer(config)),
        block_size=BLOCK,
        seed=config.seed,
        round_number=round_number,
        code_version="test",
        config={},
    )


def write(config: Config, only: Collection[str] | None = None) -> None:
    """Commit trajectories to round 1, by default all that ``seal`` does."""
    with TrajectoryStore(config.store_url).round(1).writer(provenance(config)) as writer:
        for trajectory in trajectories(24):
            if only is None or trajectory.prompt_id in only:
                writer.append(trajectory)


def seal(
    config: Config, round_number: int = 1, count: int = 24, made_by: str | None = None, broken: Collection[int] = ()
) -> None:
    """Write and seal a round as if the model before it had made it."""
    origin = provenance(config, round_number, made_by)
    trajectory_round = TrajectoryStore(config.store_url).round(round_number)
    with trajectory_round.writer(origin, writer_id="test") as writer:
        for trajectory in trajectories(count, broken=broken):
            writer.append(trajectory)
    trajectory_round.seal(origin)


@pytest.fixture
def sealed(configured: Callable[..., Config]) -> Config:
    config = configured()
    seal(config)
    return config


def job_of(config: Config, directory: Path, identity: str = "test") -> RankJob:
    """A rank's job that keeps everything under ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    return RankJob(
        config_json=config.model_dump_json(),
        round_number=1,
        identity=identity,
        checkpoints=str(directory / "checkpoints"),
        steps_log=str(directory / "steps.jsonl"),
        skips=str(directory / "skipped.jsonl"),
        stop=str(directory / "stop"),
        export=str(directory / "export"),
    )


def losses(job: RankJob) -> list[tuple[int, float, float, float]]:
    return [(r.step, r.loss, r.consistency, r.gradient_norm) for r in read_steps(Path(job.steps_log))]


def weights(job: RankJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.export) / "model.safetensors")


def exported(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.model_dir(1)) / "model.safetensors")


def train_runs(config: Config) -> list[Run]:
    """The MLflow runs of training."""
    tracker = Tracker.open(config)
    return MlflowClient(tracker.uri).search_runs([tracker.experiment_id], "tags.`jf_cluster.stage` = 'train'")


@contextmanager
def at_step(steps_log: Path, step: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something as soon as the log says ``step`` was reached."""

    def watch() -> None:
        while not any(record.step >= step for record in read_steps(steps_log)):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)


def rewind(job: RankJob, directory: Path, to_step: int) -> RankJob:
    """A copy of a finished job as if its ranks had died after checkpoint ``to_step``, with debris of the next one."""
    copied = RankJob(**(vars(job) | {n: str(directory / n) for n in ("checkpoints", "steps_log", "export")}))
    shutil.copytree(job.checkpoints, copied.checkpoints)
    shutil.copyfile(job.steps_log, copied.steps_log)
    for path in Path(copied.checkpoints).glob("step-*"):
        if int(path.name[5:11]) > to_step:
            (path / "complete.json").unlink()
            next(path.glob("*.pt")).write_bytes(b"cut off")
    return copied


def _as_rank(rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"JF_INIT_METHOD": f"file://{meeting}", "GLOO_SOCKET_IFNAME": "lo"}
    return function(*arguments)


class Ranks:
    """Processes that act as ranks and stay, forked from one that has imported DeepSpeed.

    Each world size has its own: DeepSpeed numbers a process's modules, and compares the numbers between ranks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._meetings = directory, 0
        self._groups: dict[int, list[ProcessPoolExecutor]] = {}
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which importing DeepSpeed fixes
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [f"jf_cluster.train.{name}" for name in ("engine", "checkpoints", "export")]
        )

    def call(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """What ``function`` gives on each of ``world_size`` ranks."""
        if world_size not in self._groups:
            self._groups[world_size] = [
                ProcessPoolExecutor(max_workers=1, mp_context=self._context) for _ in range(world_size)
            ]
        self._meetings += 1
        meeting = str(self._directory / f"meeting-{self._meetings}")
        calls = [
            process.submit(_as_rank, rank, world_size, meeting, function, arguments)
            for rank, process in enumerate(self._groups[world_size])
        ]
        done, _ = wait(calls, timeout=300, return_when=FIRST_EXCEPTION)
        try:
            for call in done:  # the others may be waiting for a rank that failed
                call.result()
            return [call.result(timeout=10) for call in calls]
        except BaseException:
            self.close()  # the next call gets new ones
            raise

    def train(self, job: RankJob, world_size: int) -> int:
        """Start the ranks as the driver does, again whenever they went back; how often that was."""
        train, directory = Config.model_validate_json(job.config_json).train, Path(job.checkpoints)
        make_loadable(directory, to_load(directory, job.identity, train)[0], world_size)
        for starts in range(1, 6):
            self.call(run_rank, world_size, job)
            if Path(job.export).exists() or Path(job.stop).exists():
                return starts
        raise AssertionError("the ranks return without an export")

    def close(self) -> None:
        for process in itertools.chain.from_iterable(self._groups.values()):
            for child in list(process._processes.values()):
                child.kill()  # one that waits for a rank that failed would never end by itself
            process.shutdown()
        self._groups = {}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
