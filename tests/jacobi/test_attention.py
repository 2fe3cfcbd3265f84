"""Every attention backend equals the dense oracle, and the oracle equals separate ordinary forwards.

flash-attn needs a GPU: a function with its documented meaning stands in for it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.jacobi import attention
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.layout import Branch, Forest
from jf_cluster.jacobi.support import UnsupportedModelError

from .conftest import VOCABULARY

FORESTS = (
    Forest((10, 7, 12), (Branch(0, 3, 5), Branch(0, 10, 4), Branch(2, 1, 1), Branch(2, 6, 8))),
    Forest((9,), ()),
    Forest((1, 4), (Branch(0, 1, 6), Branch(1, 2, 3))),
    # Stretches end at 48 and 96: branches behind the last token of one, behind the first of the next, at the very end.
    Forest((101, 9), (*(Branch(0, at, 13) for at in (5, 41, 48, 48, 49, 96, 101)), Branch(1, 9, 2))),
    Forest((60,), (Branch(0, 3, 40), Branch(0, 9, 130), Branch(0, 20, 30), Branch(0, 20, 30), Branch(0, 60, 49))),
)

IDS = ("three stems", "no branch", "short stems", "several pieces", "long branches")


def run(
    model: PreTrainedModel, forest: Forest, tokens: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    differentiable = backend != "flex"  # FlexAttention has no backward on CPU.
    with branch_attention(model, backend), torch.set_grad_enabled(differentiable):
        logits = model(input_ids=tokens, position_ids=forest.position_ids, use_cache=False, layout=forest).logits
    if differentiable:
        (logits.float().log_softmax(-1)[0, :, 1] * torch.linspace(0.5, 1.5, logits.shape[1])).sum().backward()
    gradient = torch.cat([torch.zeros(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
    return logits.detach()[0], gradient


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's variable-length function as it is documented, in plain operations, so that its layout is tested."""

    def flash_attn_varlen_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float, causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and causal
        assert (max_seqlen_q, max_seqlen_k) == (max(queries), max(keys))
        outs = []
        for one, many, values in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
            # Causal with the last query at the last key.
            mask = torch.ones(len(one), len(many), dtype=torch.bool).tril(len(many) - len(one))
            parts = (x.transpose(0, 1)[None] for x in (one, many, values))
            out = scaled_dot_product_attention(*parts, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("forest", FORESTS, ids=IDS)
def test_the_oracle_equals_separate_forwards(model: PreTrainedModel, forest: Forest) -> None:
    tokens = torch.randint(0, VOCABULARY, (1, forest.total_tokens), generator=torch.Generator().manual_seed(1))
    logits, _ = run(model, forest, tokens, "dense")
    stems = tokens[0].split([*forest.stem_lengths, *(b.length for b in forest.branches)])
    offset = 0
    for stem in stems[: len(forest.stem_lengths)]:
        alone = model(input_ids=stem[None]).logits[0]
        torch.testing.assert_close(logits[offset : offset + len(stem)], alone, atol=1e-4, rtol=1e-4)
        offset += len(stem)
    for branch, own in zip(forest.branches, stems[len(forest.stem_lengths) :], strict=True):
        alone = model(input_ids=torch.cat([stems[branch.stem][: branch.start], own])[None]).logits[0, branch.start :]
        torch.testing.assert_close(logits[offset : offset + branch.length], alone, atol=1e-4, rtol=1e-4)
        offset += branch.length


@pytest.mark.parametrize("forest", FORESTS, ids=IDS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_equal_the_oracle(model: PreTrainedModel, backend: str, forest: Forest) -> None:
    tokens = torch.randint(0, VOCABULARY, (1, forest.total_tokens), generator=torch.Generator().manual_seed(1))
    expected, expected_gradient = run(model, forest, tokens, "dense")
    logits, gradient = run(model, forest, tokens, backend)
    # float32 sums in another order: a few units in the last place of logits of size 10.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if backend != "flex":
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-3)


def test_pieces_are_the_same_where_there_is_no_kernel_of_the_cpu(model: PreTrainedModel) -> None:
    AttentionInterface.register(attention.implementation("pieces"), attention._interface(attention._pieces))  # type: ignore[arg-type]
    for forest in FORESTS:
        tokens = torch.randint(0, VOCABULARY, (1, forest.total_tokens), generator=torch.Generator().manual_seed(1))
        for found, expected in zip(
            run(model, forest, tokens, "pieces"), run(model, forest, tokens, "sdpa"), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_float32_model_under_autocast_gives_kernels_one_type(model: PreTrainedModel) -> None:
    """Rotary embeddings leave queries and keys in float32, and FlashAttention takes none."""
    forest, seen = FORESTS[-1], set()

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.update((query.dtype, key.dtype, value.dtype))
        return attention._sdpa(query, key, value, *rest)

    AttentionInterface.register(attention.implementation("spy"), attention._interface(spy))
    tokens = torch.randint(0, VOCABULARY, (1, forest.total_tokens), generator=torch.Generator().manual_seed(1))
    expected, _ = run(model, forest, tokens, "dense")
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = run(model, forest, tokens, "spy")
    assert seen == {torch.bfloat16}
    # Some roundings to 8 bits, one after the other, in logits of size 10.
    assert (logits.float() - expected).abs().mean() < 0.2


def test_the_models_own_attention_is_back_afterwards(qwen2: PreTrainedModel) -> None:
    before = qwen2.config._attn_implementation
    with branch_attention(qwen2), pytest.raises(ValueError, match="layout="):
        qwen2(input_ids=torch.tensor([[1, 2]]))
    assert qwen2.config._attn_implementation == before


def test_a_branch_must_hang_off_its_stem() -> None:
    with pytest.raises(ValueError, match="does not hang off"):
        Forest((4,), (Branch(0, 5, 1),))
    with pytest.raises(ValueError, match="order of their stems"):
        Forest((4, 4), (Branch(1, 2, 1), Branch(0, 2, 1)))
    with pytest.raises(ValueError, match="of their beginnings"):
        Forest((4,), (Branch(0, 2, 1), Branch(0, 1, 1)))


def test_sliding_window_models_are_refused() -> None:
    config = Qwen2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="sliding_attention"), branch_attention(Qwen2ForCausalLM(config)):
        pass
