"""Responses and trajectories of one pass equal AR and the plain block-after-block algorithm, token for token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from bench import tiny_inputs
from jf_cluster.jacobi import one_pass, traces
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.decoding import PromptError
from jf_cluster.jacobi.one_pass import respond_and_trace
from jf_cluster.jacobi.oracle import autoregressive, encode_trajectories
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling
from jf_cluster.jacobi.trajectories import trace

from .conftest import END, VOCABULARY, make_model, random_prompts

SAMPLINGS = (GREEDY, Sampling(0.8), Sampling(1.1, top_k=12, top_p=0.9))


def assert_two_stages(
    model: PreTrainedModel, prompts: Sequence[IntArray], *, forward_tokens: int = 2048, **options: object
) -> list[int]:
    """Compare with ``generate_responses`` and ``trace``; give the responses' lengths."""
    keys = [7 * i + 1 for i in range(len(prompts))]
    found = respond_and_trace(model, prompts, keys=keys, forward_tokens=forward_tokens, **options)
    writing = {k: options[k] for k in ("max_new_tokens", "end_ids", "sampling")}
    responses = generate_responses(model, prompts, keys=keys, **writing)
    tokens = [r.tokens for r in responses]
    traces = trace(model, prompts, tokens, keys=keys, block_size=options["block_size"], sampling=options["sampling"])
    for (response, got), expected, towards in zip(found, responses, traces, strict=True):
        assert (response.tokens.tolist(), response.finished) == (expected.tokens.tolist(), expected.finished)
        for name in ("iterations", "accepted", "tails"):
            mine, other = getattr(got, name), getattr(towards, name)
            assert mine.dtype == other.dtype and mine.tolist() == other.tolist()
        assert got.disagreements == towards.disagreements == 0
    return [len(t) for t in tokens]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_equals_the_plain_algorithm(model: PreTrainedModel, block_size: int, sampling: Sampling) -> None:
    prompts = random_prompts([5, 9, 1, 14])
    written = respond_and_trace(
        model, prompts, block_size=block_size, max_new_tokens=37, end_ids=[END], keys=range(4), sampling=sampling
    )
    for i, (response, got) in enumerate(written):
        plain = autoregressive(model, prompts[i].tolist(), max_new_tokens=37, end_ids=[END], sampling=sampling, key=i)
        assert response.tokens.tolist() == plain and response.finished == (plain[-1] == END)
        iterates = encode_trajectories(
            model, prompts[i], np.array(plain), block_size=block_size, key=i, sampling=sampling
        )
        assert (got.iterations.tolist(), got.accepted.tolist(), got.tails.tolist()) == iterates


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    architecture=st.sampled_from(["qwen2", "qwen3", "llama"]),
    block_size=st.integers(1, 20),
    max_new_tokens=st.integers(1, 45),
    lengths=st.lists(st.integers(1, 20), max_size=12),
    end_ids=st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    sampling=st.sampled_from(SAMPLINGS),
    forward_tokens=st.sampled_from([1, 60, 2048]),
)
def test_equals_two_stages_at_any_lengths_ends_and_rows(
    seed: int,
    architecture: str,
    block_size: int,
    max_new_tokens: int,
    lengths: list[int],
    end_ids: set[int],
    sampling: Sampling,
    forward_tokens: int,
) -> None:
    """Few ``forward_tokens`` mean few rows at a time, so that prompts wait and join."""
    assert_two_stages(
        make_model(architecture, seed % 3),
        random_prompts(lengths, seed),
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        end_ids=sorted(end_ids),
        sampling=sampling,
        forward_tokens=forward_tokens,
    )


def test_the_end_at_every_place_of_a_block(qwen2: PreTrainedModel) -> None:
    """The end token is whichever the model writes there first, so each run ends at another place."""
    (prompt,) = random_prompts([9])
    (written,) = generate_responses(qwen2, [prompt], max_new_tokens=30, end_ids=[])
    found = set()
    for end in sorted(set(written.tokens.tolist())):
        options = {"block_size": 6, "max_new_tokens": 30, "end_ids": [end], "sampling": GREEDY}
        found.update(assert_two_stages(qwen2, [prompt], **options))
    assert {length % 6 for length in found} == set(range(6))


@pytest.mark.parametrize("joining", [1, 3])
def test_a_trained_model_with_rows_that_join(monkeypatch: pytest.MonkeyPatch, joining: int) -> None:
    model = tiny_inputs.load(tiny_inputs.TINY, "cpu")
    prompts, end = tiny_inputs.prompts(tiny_inputs.TINY, 8)
    monkeypatch.setattr(one_pass, "JOINING_ROWS", joining)
    lengths = assert_two_stages(
        model, prompts, block_size=16, max_new_tokens=120, end_ids=[end], sampling=GREEDY, forward_tokens=64
    )
    assert min(lengths) < 120


def test_low_precision_keeps_what_its_own_forwards_chose(qwen2: PreTrainedModel) -> None:
    """Rounding may choose another response than AR; the trace still leads to the one that is given."""
    model = make_model("qwen2").to(torch.bfloat16)
    for response, got in respond_and_trace(
        model, random_prompts([5, 9, 14]), block_size=8, max_new_tokens=33, end_ids=[END], keys=range(3)
    ):
        assert got.disagreements == 0 and len(got.iterations) == -(-len(response.tokens) // 8)
        sizes = np.minimum(8, len(response.tokens) - 8 * np.repeat(np.arange(len(got.iterations)), got.iterations))
        assert len(got.tails) == (sizes - got.accepted).sum() and (got.accepted < sizes).all()


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_tokens_that_fill_a_forward_up_change_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    prompts = random_prompts([5, 9, 1, 14, 3])
    options = {"block_size": 5, "keys": range(5), "sampling": sampling}

    def collected() -> list[list[int]]:
        written = respond_and_trace(model, prompts, max_new_tokens=23, end_ids=[END], **options)
        towards = trace(model, prompts, [r.tokens for r, _ in written], **options)
        return [x.tolist() for r, t in written for x in (r.tokens, t.accepted, t.tails)] + [
            x.tolist() for t in towards for x in (t.accepted, t.tails)
        ]

    alone = collected()
    monkeypatch.setattr(traces, "token_step", lambda model: 8)
    assert collected() == alone


def test_forwards_in_low_precision_have_few_lengths() -> None:
    low, lengths = make_model("qwen2").to(torch.bfloat16), []
    with branch_attention(low):  # tries the model first, on a few tokens
        pass
    low.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompts = random_prompts([5, 9, 30, 14])
    written = respond_and_trace(low, prompts, block_size=5, max_new_tokens=23, end_ids=[END], keys=range(4))
    trace(low, prompts, [r.tokens for r, _ in written], block_size=5, keys=range(4))
    assert len(lengths) > 10 and all(n % traces.LOW_PRECISION_STEP == 0 for n in lengths)


def test_prompts_that_cannot_be_continued_are_refused(qwen2: PreTrainedModel) -> None:
    options = {"block_size": 4, "end_ids": [END], "keys": [0]}
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        respond_and_trace(qwen2, [np.zeros(0, np.int64)], max_new_tokens=5, **options)
    with pytest.raises(PromptError, match="exceeds"):
        respond_and_trace(qwen2, random_prompts([250]), max_new_tokens=7, **options)
