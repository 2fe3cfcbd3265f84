"""What the embedded base was trained on stays what it was, whoever makes the batches."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.tiny_inputs import TINY
from jf_cluster.tiny import pretrain
from jf_cluster.tiny.pretrain import Batch, Pools


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


def as_trained(pools: Pools) -> Iterator[Batch]:
    order = random.Random(pools.seed)
    for pool in pools.after(0):
        order.shuffle(pool)
        yield from pool


def test_the_shipped_base_would_be_trained_on_the_same_batches_again(tokenizer: PreTrainedTokenizerFast) -> None:
    digest = hashlib.sha256()
    for ids, labels in itertools.islice(as_trained(Pools(tokenizer, 1, 4096)), 100):
        digest.update(ids.tobytes() + labels.tobytes())
    assert digest.hexdigest() == "e92cc9e2ba5c9bcaf0b168bd1c60885e76533dea1b63d26d571b3368ed58e20e"


def test_other_processes_make_the_same_pools_in_the_same_order(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "POOL_PROBLEMS", 16)
    pools = Pools(tokenizer, 0, 512, rest=True)
    here, there = (list(itertools.islice(pools.after(3, workers), 5)) for workers in (0, 2))
    assert [len(pool) for pool in here] == [len(pool) for pool in there]
    for one, other in zip(itertools.chain(*here), itertools.chain(*there), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(sum(len(ids) for ids, _ in pool) == 16 for pool in here), "the longest problems are left over"
    assert all(ids.size <= 512 for pool in here for ids, _ in pool)
