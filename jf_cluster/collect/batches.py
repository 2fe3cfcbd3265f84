"""Which prompts of a round are left, and in which batches they are decoded; each batch is made when it is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jf_cluster.collect.prompts import Prompt, Prompts
from jf_cluster.config import Config
from trajectory_store import PromptIds, Round, order_windows

Places = NDArray[np.int64]

AT_ONCE = 1 << 20
"""Prompts whose ids are made and looked up at a time."""


def left_over(prompts: Prompts, folder: Round) -> Places:
    """Places of the prompts that are neither committed nor rejected."""
    committed, rejected = folder.committed_ids(), PromptIds([pa.array(list(folder.rejects()), pa.string())])
    left: list[Places] = [np.zeros(0, np.int64)]
    for begin in range(0, len(prompts), AT_ONCE):
        ids = prompts.ids(begin, begin + AT_ONCE)
        left.append(begin + np.flatnonzero(~(committed.mask(ids) | rejected.mask(ids))))
    return np.concatenate(left)


def batches_of(config: Config, prompts: Prompts, left: Places) -> Iterator[list[Prompt]]:
    """Batches of the prompts at some places; for a trainer that follows, in the pieces that it takes them in."""
    for piece in _pieces(config, prompts, left):
        for places in batches_by_length(prompts.characters[piece], config.collect.batch_prompts):
            yield prompts.take(piece[places])


def _pieces(config: Config, prompts: Prompts, left: Places) -> Iterator[Places]:
    if config.overlap == "alternate":
        yield left
        return
    is_left = np.zeros(len(prompts), bool)
    is_left[left] = True
    by_id = prompts.by_id()  # a prompt's place among them is its row in the round
    for rows in order_windows(len(prompts), config.seed, 0, config.train.packing_rows):
        piece = by_id[rows]
        yield piece[is_left[piece]]


def batches_by_length(lengths: Sequence[int] | NDArray[np.int32], size: int) -> Iterator[Places]:
    """Places of prompts of similar length together, the longest first: what does not fit in memory shows at once."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    return (order[start : start + size] for start in range(0, len(order), size))
