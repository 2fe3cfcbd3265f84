"""Every decoding mode gives exactly what AR gives, greedy and sampled, single and batched."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from jf_cluster.jacobi.attention import UnsupportedModelError
from jf_cluster.jacobi.decoding import PromptError, generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting, NgramPool
from jf_cluster.jacobi.sampling import GREEDY, Sampling

from .conftest import END, make_model, oracle_responses, random_prompts

DRAFTINGS = (
    AUTOREGRESSIVE,
    Drafting("jacobi", 8),
    Drafting("multiblock", 8, blocks=2, spawn_ratio=0.5, pool=4),
    Drafting("multiblock", 6, blocks=3, spawn_ratio=0.0, pool=2),
    Drafting("multiblock", 4, blocks=1, pool=0),
)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.9, top_k=10, top_p=0.9)], ids=str)
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
def test_every_mode_equals_ar(model: PreTrainedModel, drafting: Drafting, sampling: Sampling) -> None:
    prompts = random_prompts([5, 9, 1, 14])
    expected = oracle_responses(model, prompts, 37, sampling)
    batch = generate(
        model, [p.tolist() for p in prompts], max_new_tokens=37, end_ids=[END], drafting=drafting, sampling=sampling
    )
    assert [g.tokens for g in batch] == expected
    for i, prompt in enumerate(prompts):
        (single,) = generate(
            model, [prompt.tolist()], max_new_tokens=37, end_ids=[END], drafting=drafting, sampling=sampling, keys=[i]
        )
        assert single.tokens == expected[i]
        # A row's drafts depend on the row alone, so neither do its forwards depend on the batch.
        assert single.accepted_runs == batch[i].accepted_runs
        assert sum(single.accepted_runs) == len(expected[i])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    block_size=st.integers(1, 12),
    blocks=st.integers(1, 3),
    spawn_ratio=st.floats(0, 1),
    pool=st.integers(0, 4),
    limit=st.integers(1, 40),
    mode=st.sampled_from(["jacobi", "multiblock"]),
)
def test_any_options_equal_ar(seed, lengths, block_size, blocks, spawn_ratio, pool, limit, mode) -> None:
    model = make_model("qwen2", seed % 3)
    prompts = random_prompts(lengths, seed)
    drafting = Drafting(mode, block_size, blocks, spawn_ratio, pool)
    got = generate(model, [p.tolist() for p in prompts], max_new_tokens=limit, end_ids=[END], drafting=drafting)
    assert [g.tokens for g in got] == oracle_responses(model, prompts, limit)


def test_ar_is_one_token_a_forward_and_parallel_modes_are_counted_alike(qwen2: PreTrainedModel) -> None:
    prompts = [p.tolist() for p in random_prompts([5, 9])]
    for drafting in (AUTOREGRESSIVE, Drafting("multiblock", 8, pool=4)):
        for g in generate(qwen2, prompts, max_new_tokens=30, end_ids=[END], drafting=drafting):
            assert g.forwards == len(g.accepted_runs) - 1
            assert g.tpf == pytest.approx((len(g.tokens) - 1) / g.forwards)
            assert drafting.mode != "ar" or g.tpf == 1.0


def test_tokens_stream_in_order(qwen2: PreTrainedModel) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    got = generate(
        qwen2,
        [p.tolist() for p in random_prompts([5, 9])],
        max_new_tokens=30,
        end_ids=[END],
        drafting=Drafting("jacobi", 8),
        on_tokens=lambda row, tokens: seen[row].extend(tokens),
    )
    assert [seen[0], seen[1]] == [g.tokens for g in got]


def test_several_end_tokens(qwen2: PreTrainedModel) -> None:
    prompts = random_prompts([6])
    (whole,) = oracle_responses(qwen2, prompts, 30)
    end = whole[4]
    got = generate(qwen2, [prompts[0].tolist()], max_new_tokens=30, end_ids=[END, end], drafting=Drafting("jacobi", 8))[
        0
    ]
    assert got.tokens == whole[: whole.index(end) + 1] and got.finished


def test_bad_input_is_refused_before_any_work(qwen2: PreTrainedModel) -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        generate(qwen2, [[1], []], max_new_tokens=5, end_ids=[END])
    with pytest.raises(PromptError, match="context of 256"):
        generate(qwen2, [[1] * 250], max_new_tokens=7, end_ids=[END])
    with pytest.raises(ValueError, match="unknown decoding mode 'warp'"):
        Drafting("warp")  # type: ignore[arg-type]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        generate(t5, [[1]], max_new_tokens=5, end_ids=[END])


def test_the_pool_keeps_the_newest_runs() -> None:
    pool = NgramPool(per_token=2, length=3)
    pool.add([1, 2, 3, 4, 5])
    pool.add([1, 9, 9])
    pool.add([1, 8])
    assert pool.find(1) == [(8,), (9, 9)]
    assert pool.find(2) == [(3, 4, 5)]
    assert pool.find(7) == []
