"""The plain algorithms, written to be read: one prompt, one block, one forward at a time, no cache, no batching.

They define what everything else must equal token for token in float32: the tests compare with them. The procedures that
``bench/`` measures against are in ``bench/published.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling, initial_guess


@torch.inference_mode()
def next_tokens(
    model: PreTrainedModel, tokens: Sequence[int], prompt_length: int, sampling: Sampling, key: int
) -> list[int]:
    """What the model writes after each token of the sequence from the prompt's last token on."""
    logits = model(input_ids=torch.tensor([list(tokens)], device=model.device)).logits[0, prompt_length - 1 :]
    positions = torch.arange(len(logits), device=logits.device)
    chosen: list[int] = sampling.choose(logits, torch.full_like(positions, key), positions).tolist()
    return chosen


def autoregressive(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    key: int = 0,
) -> list[int]:
    """Write a response one token at a time, the end token included."""
    response: list[int] = []
    while len(response) < max_new_tokens and not (response and response[-1] in end_ids):
        response.append(next_tokens(model, [*prompt, *response], len(prompt), sampling, key)[-1])
    return response


def block_trajectory(
    model: PreTrainedModel,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    block: int,
    block_size: int,
    key: int,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """All iterates of one block, from the initial guess up to the fixed point."""
    start = block * block_size
    fixed = list(response[start : start + block_size])
    prefix = [*prompt, *response[:start]]
    guess = initial_guess(key, block, np.array(prefix, dtype=np.int64), block_size)
    iterate = [fixed[0], *guess[1 : len(fixed)].tolist()]
    iterates = [iterate]
    while iterate != fixed:
        accepted = next(i for i, (a, b) in enumerate(zip(iterate, fixed, strict=True)) if a != b)
        written = next_tokens(model, [*prefix, *iterate], len(prompt), sampling, key)[start:]
        # Places before `accepted` are fixed already; the one at it is given by the response (which the model itself
        # would write, in float32); later ones are the model's choice given the old iterate before them.
        iterate = [*fixed[: accepted + 1], *written[accepted + 1 : len(fixed)]]
        iterates.append(iterate)
    return iterates


def accepted_prefix(iterate: Sequence[int], fixed: Sequence[int]) -> int:
    """Length of the leading part of an iterate that equals the fixed point."""
    return next((i for i, (a, b) in enumerate(zip(iterate, fixed, strict=True)) if a != b), len(fixed))


def encode_trajectories(
    model: PreTrainedModel,
    prompt: IntArray,
    response: IntArray,
    *,
    block_size: int,
    key: int,
    sampling: Sampling = GREEDY,
) -> tuple[list[int], list[int], list[int]]:
    """``(iterations, accepted, tails)`` of a response, block after block, as the store keeps them."""
    iterations, accepted, tails = [], [], []
    for block in range(-(-len(response) // block_size)):
        *iterates, fixed = block_trajectory(
            model, prompt.tolist(), response.tolist(), block=block, block_size=block_size, key=key, sampling=sampling
        )
        iterations.append(len(iterates))
        for iterate in iterates:
            accepted.append(accepted_prefix(iterate, fixed))
            tails += iterate[accepted[-1] :]
    return iterations, accepted, tails
