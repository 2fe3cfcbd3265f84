"""A minuscule model directory with a real tokenizer and chat template, for all tests of using a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.inference.loaded import Loaded, load

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, one token a byte, context of 256 tokens."""
    target = tmp_path_factory.mktemp("models") / "minuscule"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(target)
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=len(letters) + 1, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0,
        initializer_range=0.3, **sizes,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.lm_head.weight.data[0] = 0  # its logit is always 0, so greedy responses never end before their limit
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def loaded(directory: Path) -> Loaded:
    return load(str(directory), device="cpu")
