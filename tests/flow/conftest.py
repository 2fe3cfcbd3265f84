"""A minuscule model with the embedded run's tokenizer, configurations on it, and one local Ray for all these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jf_cluster.cluster import connected
from jf_cluster.config import Config
from jf_cluster.tiny.pretrain import build_tokenizer
from jf_cluster.tracking import Tracker


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


@pytest.fixture
def config(tmp_path: Path, base_model: Path) -> Config:
    return small_config(tmp_path / "runs", base_model)


@pytest.fixture
def tracker(config: Config) -> Tracker:
    return Tracker.open(config)


@pytest.fixture(scope="package")
def local_ray(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with connected(small_config(tmp_path_factory.mktemp("ray"), base_model)):
        yield
