"""A trained model, whose near-certain and repetitive text random weights do not have: the same equalities hold."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedModel

from bench import tiny_inputs
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.oracle import autoregressive, encode_trajectories
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling
from jf_cluster.jacobi.trajectories import trace

NEW_TOKENS = 160
SAMPLINGS = (GREEDY, Sampling(0.7, top_p=0.95))

Written = tuple[list[IntArray], list[list[int]], Sampling]


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    return tiny_inputs.load(tiny_inputs.TINY, "cpu")


@pytest.fixture(scope="module", params=SAMPLINGS, ids=str)
def written(request: pytest.FixtureRequest, trained: PreTrainedModel) -> Written:
    """Held-out problems, and what AR writes for each with its index as key."""
    prompts, end = tiny_inputs.prompts(tiny_inputs.TINY, 3)
    responses = [
        autoregressive(trained, p.tolist(), max_new_tokens=NEW_TOKENS, end_ids=[end], sampling=request.param, key=i)
        for i, p in enumerate(prompts)
    ]
    assert any(r[-1] == end for r in responses)
    return prompts, responses, request.param


@pytest.mark.parametrize("drafting", [Drafting("jacobi", 16), Drafting("multiblock", 8, pool=4)], ids=str)
def test_every_mode_equals_ar(trained: PreTrainedModel, written: Written, drafting: Drafting) -> None:
    prompts, responses, sampling = written
    made = generate(
        trained,
        [p.tolist() for p in prompts],
        max_new_tokens=NEW_TOKENS,
        end_ids=[tiny_inputs.prompts(tiny_inputs.TINY, 0)[1]],
        drafting=drafting,
        sampling=sampling,
    )
    assert [g.tokens for g in made] == responses
    assert all(g.tpf > 1 for g in made)


@pytest.mark.parametrize("block_size", [5, 16])
def test_trajectories_equal_the_plain_algorithm(trained: PreTrainedModel, written: Written, block_size: int) -> None:
    prompts, responses, sampling = written
    traces = trace(
        trained, prompts, [np.array(r) for r in responses], block_size=block_size, keys=range(3), sampling=sampling
    )
    for i, got in enumerate(traces):
        plain = encode_trajectories(
            trained, prompts[i], np.array(responses[i]), block_size=block_size, key=i, sampling=sampling
        )
        assert (got.iterations.tolist(), got.accepted.tolist(), got.tails.tolist()) == plain
    assert sum(t.disagreements for t in traces) == 0
