"""Models of other architectures are decoded and trained as they are, or refused: never run wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jf_cluster.jacobi import support
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate
from jf_cluster.jacobi.samples import Sample
from jf_cluster.jacobi.sampling import Sampling
from jf_cluster.jacobi.support import UnsupportedModelError

from .conftest import END, VOCABULARY, make_model, oracle_responses, random_prompts

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COMPRESSED = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, **EXPERTS,
}  # fmt: skip


def make(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END,
            **settings,
        },
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": None}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("qwen3_moe", EXPERTS),
        ("olmo2", {}),
        ("phi3", {"sliding_window": None}),
    ],
)
def test_other_decoders_decode_sample_and_train_as_they_are(kind: str, settings: dict[str, Any]) -> None:
    model = make(kind, **settings)
    prompts, sampling = random_prompts([9, 5]), Sampling(0.9)
    for chosen in (Sampling(), sampling):
        expected = oracle_responses(model, prompts, 20, chosen)
        for drafting in (AUTOREGRESSIVE, Drafting("multiblock", 6)):
            got = generate(
                model, [p.tolist() for p in prompts], max_new_tokens=20, end_ids=[END], drafting=drafting,
                sampling=chosen,
            )  # fmt: skip
            assert [g.tokens for g in got] == expected
    stem = np.arange(20) % VOCABULARY
    with branch_attention(model), torch.no_grad():
        ours = forcing_loss(model, collate([Sample(8, stem, ())])).ar_sum
    with torch.no_grad():
        logits = model(torch.from_numpy(stem)[None]).logits[0, 7:-1]
    expected_loss = cross_entropy(logits, torch.from_numpy(stem[8:]), reduction="sum")
    torch.testing.assert_close(ours, expected_loss)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mistral", {"sliding_window": 8}, "attends to the last 8 tokens of its context of 128"),
        ("phi3", {"sliding_window": 8}, "set max_position_embeddings to 8"),
        ("starcoder2", {"sliding_window": 8}, "full attention in every layer"),
        ("deepseek_v3", COMPRESSED, "MLA"),
        ("diffllama", {}, "computes other logits in branches"),  # two halves of attention share a layer's cache
        ("nanochat", {"dtype": torch.bfloat16}, "bounds its scores or logits"),  # which rounding could hide
        ("nemotron", {}, "cannot be run in branches, a forward of 8 tokens fails"),  # attention without arguments
        ("gpt2", {}, "does not use transformers' attention interface"),
    ],
)
def test_models_that_would_be_run_wrongly_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    if kind == "gpt2":
        settings = {"num_key_value_heads": None}
    model = make(kind, **settings)
    before = model.config._attn_implementation
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=message), branch_attention(model):
            pass
    assert model.config._attn_implementation == before


def test_rotary_angles_that_change_with_the_length_are_refused() -> None:
    rotary = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    settings = {"rope_parameters": rotary, "original_max_position_embeddings": 32, "sliding_window": None}
    with pytest.raises(UnsupportedModelError, match="set max_position_embeddings to 32"):
        support.check_model(make("phi3", **settings))
    support.check_model(make("phi3", max_position_embeddings=32, **settings))


@pytest.mark.parametrize(
    ("kind", "rotary"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_stands_past_the_context(kind: str, rotary: dict[str, Any], count: int) -> None:
    """One position past it, and such a model turns all others of the forward by other angles."""
    settings = {"rope_parameters": {"rope_theta": 1e4, **rotary}, "sliding_window": None}
    model = make(kind, max_position_embeddings=64, original_max_position_embeddings=64, **settings)
    for seed in range(4):
        prompts = random_prompts([20, 11][:count], seed)
        expected = oracle_responses(model, prompts, 44)
        for drafting in (Drafting("jacobi", 8), Drafting("multiblock", 8, pool=4)):
            got = generate(model, [p.tolist() for p in prompts], max_new_tokens=44, end_ids=[END], drafting=drafting)
            assert [g.tokens for g in got] == expected


def test_a_model_is_tried_once_and_not_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    whole = support.check_forward
    monkeypatch.setattr(
        "jf_cluster.jacobi.attention.check_forward", lambda *given: tried.append(whole(*given)) or tried[-1]
    )
    model = make_model("qwen2").train()
    for train in (True, False, False):
        with branch_attention(model.train(train)):
            pass
    assert tried == [False, True]


def test_blocks_of_branch_attention_may_overlap() -> None:
    model = make_model("qwen2")
    before = model.config._attn_implementation
    first, second = branch_attention(model, "dense"), branch_attention(model, "sdpa")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "branches_sdpa_jf_cluster_jacobi_attention"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == before
