"""A minuscule model with the embedded run's tokenizer, configurations on it, and one local Ray for all these tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from jf_cluster.cluster import connected
from jf_cluster.collect import collect_round
from jf_cluster.collect.worker import Collector
from jf_cluster.config import Config
from jf_cluster.tiny.pretrain import build_tokenizer
from jf_cluster.tracking import Tracker
from trajectory_store import Manifest

ROOT = Path(__file__).parent.parent.parent


def save_model(directory: Path, seed: int) -> Path:
    """A random two-layer Qwen2 whose large weights make its greedy output irregular, with its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer(vocab_size=320, examples=200)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


def small_config(runs_dir: Path, model: Path, **changes: object) -> Config:
    """Twenty prompts, short responses, two workers; ``changes`` are whole sections or dotted through ``__``."""
    tree: dict = {
        "name": "small",
        "runs_dir": runs_dir,
        "model": {"path": str(model)},
        "prompts": {"per_round": 20, "held_out": 12, "grader": "arithmetic"},
        "collect": {
            "workers": 2,
            "batch_prompts": 4,
            "max_new_tokens": 20,
            "block_size": [8],
            "commit_every_s": 0,
        },
        "train": {"workers": 2, "micro_batches_per_step": 2},
        "evaluate": {"prompts": 12, "speed_prompts": 2, "batch_prompts": 4, "max_new_tokens": 20},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return Config.model_validate(tree)


def run(*command: str, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository root with the package importable and this Python first on the path."""
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def chain_config(runs_dir: Path, model: Path, **changes: object) -> Config:
    """For the whole chain: one rank, four steps, a checkpoint half way; batches so small that there are many."""
    train = {
        "workers": 1,
        "steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "micro_batch_tokens": 512,
        "micro_batches_per_step": 2,
        "checkpoint_every_steps": 2,
        "replay_rounds": 1,
    }
    return small_config(runs_dir, model, train=train, collect__batch_prompts=2, **changes)


def chain_command(config: Config, job: str = "distill") -> list[str]:
    """What a person types to have ``config`` carried out; its file lies beside the runs."""
    settings = config.runs_dir.with_name("small.yaml")
    settings.write_text(config.to_yaml())
    return [sys.executable, f"jobs/{job}.py", "--config", str(settings)]


def stopped_when(
    has: Callable[[], bool], number: signal.Signals, command: list[str], said: Path, **variables: str
) -> int:
    """Start a driver, signal it as soon as it ``has`` come so far, and give its exit code; ``said`` is its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )
    while not has():
        assert process.poll() is None, f"it ended before: {said.read_text()}"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.fixture(scope="package")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> tuple[Config, str]:
    """Two rounds of the chain that nothing happens to, with a Ray of their own, and the table they end with."""
    config = chain_config(tmp_path_factory.mktemp("undisturbed") / "runs", base_model, rounds=2)
    done = run(*chain_command(config), timeout_s=600)
    assert done.returncode == 0, done.stderr
    return config, done.stdout


@pytest.fixture
def config(tmp_path: Path, base_model: Path) -> Config:
    return small_config(tmp_path / "runs", base_model)


@pytest.fixture
def tracker(config: Config) -> Tracker:
    return Tracker.open(config)


def collected(config: Config, round_number: int = 1, worker_class: type[Collector] = Collector) -> Manifest:
    """Collect a round with workers that may break."""
    config.runs_dir.mkdir(parents=True, exist_ok=True)
    return collect_round(config, round_number, Tracker.open(config), worker_class)


@pytest.fixture(scope="package")
def local_ray(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with connected(small_config(tmp_path_factory.mktemp("ray"), base_model)):
        yield


@pytest.fixture(scope="package")
def reference(tmp_path_factory: pytest.TempPathFactory, base_model: Path, local_ray: None) -> tuple[Config, Manifest]:
    """The undisturbed collection that the disturbed ones are compared with."""
    config = small_config(tmp_path_factory.mktemp("reference"), base_model)
    return config, collected(config)
