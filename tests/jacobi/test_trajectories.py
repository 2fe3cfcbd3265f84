"""Parallel collection equals the plain block-after-block algorithm, token for token in float32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from jf_cluster.jacobi.oracle import encode_trajectories
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.sampling import GREEDY, Sampling, initial_guess, prompt_key
from jf_cluster.jacobi.traces import Trace
from jf_cluster.jacobi.trajectories import trace

from .conftest import END, VOCABULARY, make_model, oracle_responses, random_prompts

SAMPLINGS = (GREEDY, Sampling(0.8), Sampling(1.1, top_k=12, top_p=0.9))


def assert_plain(model: PreTrainedModel, traces: list[Trace], prompts, responses, block_size: int, sampling) -> None:
    for i, got in enumerate(traces):
        plain = encode_trajectories(
            model, prompts[i], np.array(responses[i]), block_size=block_size, key=i, sampling=sampling
        )
        assert (got.iterations.tolist(), got.accepted.tolist(), got.tails.tolist()) == plain


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_equals_the_plain_algorithm(model: PreTrainedModel, block_size: int, sampling: Sampling) -> None:
    prompts = random_prompts([5, 9, 1, 14])
    responses = oracle_responses(model, prompts, 37, sampling)
    # A budget below the batch's size makes several waves of it.
    traces = trace(
        model, prompts, [np.array(r) for r in responses], block_size=block_size, keys=range(4), forward_tokens=80,
        sampling=sampling,
    )  # fmt: skip
    assert [t.disagreements for t in traces] == [0] * 4
    assert_plain(model, traces, prompts, responses, block_size, sampling)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    block_size=st.integers(1, 20),
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=5),
)
def test_any_lengths_and_any_writer(seed: int, block_size: int, lengths: list[tuple[int, int]]) -> None:
    """Responses here are arbitrary tokens another model might have written: whole, empty, ends anywhere."""
    model = make_model("qwen2", seed % 3)
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, size=p) for p, _ in lengths]
    responses = [random.integers(0, VOCABULARY, size=r) for _, r in lengths]
    traces = trace(model, prompts, responses, block_size=block_size, keys=range(len(lengths)))
    assert_plain(model, traces, prompts, responses, block_size, GREEDY)
    for t, r in zip(traces, responses, strict=True):
        assert len(t.iterations) == -(-len(r) // block_size)
        assert (t.iterations < block_size).all() or block_size == 1


def test_disagreements_count_what_the_model_would_not_write(qwen2: PreTrainedModel) -> None:
    prompts = random_prompts([6, 8])
    responses = [np.array(r) for r in oracle_responses(qwen2, prompts, 20)]
    responses[1] = responses[1].copy()
    responses[1][-1] = (responses[1][-1] + 1) % VOCABULARY
    assert [t.disagreements for t in trace(qwen2, prompts, responses, block_size=8, keys=[0, 1])] == [0, 1]


def test_responses_equal_the_oracle_in_a_ragged_batch(model: PreTrainedModel) -> None:
    prompts = random_prompts([3, 17, 1, 8, 8, 30], seed=4)
    written = generate_responses(model, prompts, max_new_tokens=25, end_ids=[END])
    assert [r.tokens.tolist() for r in written] == oracle_responses(model, prompts, 25)
    assert [r.finished for r in written] == [r.tokens[-1] == END for r in written]


def test_guesses_come_from_the_context_and_depend_on_key_and_block_alone() -> None:
    context = np.array([5, 6, 7])
    first = initial_guess(prompt_key(0, 1, "a"), 3, context, 50)
    assert set(first.tolist()) == {5, 6, 7}
    assert first.tolist() == initial_guess(prompt_key(0, 1, "a"), 3, context, 50).tolist()
    others = [prompt_key(1, 1, "a"), prompt_key(0, 2, "a"), prompt_key(0, 1, "b")]
    assert all(first.tolist() != initial_guess(k, 3, context, 50).tolist() for k in others)
    assert first.tolist() != initial_guess(prompt_key(0, 1, "a"), 4, context, 50).tolist()
