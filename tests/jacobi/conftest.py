"""Minuscule random models of the three architectures the algorithm layer is tested with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jf_cluster.jacobi.oracle import autoregressive
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling

VOCABULARY, END = 40, 3
ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, True),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, False),
    "llama": (LlamaConfig, LlamaForCausalLM, False),
}


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose large weights make its greedy output irregular (small ones repeat a token for ever)."""
    config_class, model_class, tied = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return model_class(config).eval()


def llama_tokenizer(*words: str) -> Tokenizer:
    """Llama 2's rules: a space before every text, which decoding takes away again; bytes for unknown characters.

    Text is encoded letter by letter; ``words``, ids 3 and on, are for responses. Id 0 is a special token.
    """
    letters = "▁abcdefghijklmnopqrstuvwxyz=\n[]().:3"
    pieces = ["<s>", "</s>", "<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="session")
def qwen2() -> PreTrainedModel:
    return make_model("qwen2")


def random_prompts(lengths: list[int], seed: int = 0) -> list[IntArray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, size=n) for n in lengths]


def oracle_responses(
    model: PreTrainedModel, prompts: list[IntArray], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """What AR writes, each prompt's index its key."""
    return [
        autoregressive(model, p.tolist(), max_new_tokens=max_new_tokens, end_ids=[END], sampling=sampling, key=i)
        for i, p in enumerate(prompts)
    ]
