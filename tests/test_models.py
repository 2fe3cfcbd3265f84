"""Finding, loading and fingerprinting models, and what is said when that cannot be done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.config import Config
from jf_cluster.models import ModelError, end_ids, load_model, load_tokenizer, model_hash, resolve, tokenizer_hash


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=1, eos_token_id=1, **sizes)).save_pretrained(target)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(8)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(target)
    return target


def config_of(path: Path | str) -> Config:
    return Config.model_validate({"model": {"path": str(path)}})


def test_the_hash_follows_the_weights_and_nothing_else(directory: Path, tmp_path: Path) -> None:
    before = model_hash(str(directory))
    moved = shutil.copytree(directory, tmp_path / "elsewhere")
    (moved / "lineage.json").write_text("{}")
    assert model_hash(str(moved)) == before
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(bytes(weights))
    assert model_hash(str(moved)) != before


def test_the_tokenizers_hash_does_not_depend_on_how_it_was_used(directory: Path) -> None:
    tokenizer = load_tokenizer(config_of(directory))
    before = tokenizer_hash(tokenizer)
    tokenizer(["w3 w4", "w3"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != before


def test_end_tokens_of_model_and_tokenizer_are_joined(directory: Path) -> None:
    config = config_of(directory)
    model, tokenizer = load_model(config, 0), load_tokenizer(config)
    assert model.dtype == torch.float32 and not model.training
    assert end_ids(model, tokenizer) == [1]
    model.generation_config = GenerationConfig(eos_token_id=[5, 3])
    assert end_ids(model, tokenizer) == [1, 3, 5]
    model.generation_config, tokenizer.eos_token = GenerationConfig(), None
    with pytest.raises(ModelError, match="names an end token"):
        end_ids(model, tokenizer)


def test_what_is_missing_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*nowhere: the directory does not exist"):
        resolve(str(tmp_path / "nowhere"))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        load_model(config_of(directory), 0)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model(config_of(directory), 0)


def test_a_hub_model_that_cannot_be_fetched_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no model nobody/nothing: neither a local directory nor"):
        resolve("nobody/nothing")


def test_a_tokenizer_that_is_not_there_is_a_clear_error(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(config_of(directory))
