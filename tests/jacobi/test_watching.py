"""A watched response is the response itself, and its forwards account for every token."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.watching import watch
from tests.jacobi.conftest import END, random_prompts


@pytest.mark.parametrize("drafting", [Drafting("jacobi", 8), Drafting("multiblock", 8, blocks=3, pool=4)])
def test_watching_changes_nothing_and_accounts_for_every_token(qwen2: PreTrainedModel, drafting: Drafting) -> None:
    recycled = behind = 0
    for key, prompt in enumerate(random_prompts([5, 9, 13, 20])):
        watched = watch(qwen2, prompt.tolist(), max_new_tokens=60, end_ids=[END], drafting=drafting, key=key)
        (made,) = generate(
            qwen2, [prompt.tolist()], max_new_tokens=60, end_ids=[END], drafting=drafting, keys=[key]
        )  # fmt: skip
        assert list(watched.tokens) == made.tokens
        assert [f.accepted for f in watched.forwards] == made.accepted_runs[1:]
        at = 1
        for forward in watched.forwards:
            assert forward.at == at and 0 <= forward.active <= forward.drafted
            at += forward.accepted
        assert at == len(made.tokens)
        recycled += sum(f.recycled for f in watched.forwards)
        behind += sum(f.active < f.drafted for f in watched.forwards)
    assert (recycled > 0) == (behind > 0) == (drafting.mode == "multiblock")
