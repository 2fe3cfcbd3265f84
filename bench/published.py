"""The published procedures, written afresh from the paper's description, as the other side of the benchmarks.

Collecting: one prompt at a time, block after block, one forward an iteration over the block's remaining tokens with a
key-value cache. Training: one sample a step, clean and noisy blocks interleaved at full length under one dense mask,
float32 logits of every token (the paper's figure 6 and section 3.2, and the layout the published trainer asserts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from jf_cluster.jacobi.samples import Sample
from jf_cluster.jacobi.sampling import IntArray, initial_guess


@torch.inference_mode()
def collect(
    model: PreTrainedModel, prompt: IntArray, *, block_size: int, max_new_tokens: int, end_id: int, key: int
) -> tuple[list[int], list[list[list[int]]]]:
    """Decode one prompt block after block; gives the response and every block's iterates.

    The initial guesses are ours, so that both sides iterate the same blocks.
    """
    device = model.device
    cache = DynamicCache(config=model.config)
    out = model(input_ids=torch.from_numpy(prompt[None]).to(device), past_key_values=cache, use_cache=True)
    following = int(out.logits[0, -1].argmax())
    response: list[int] = []
    trajectory: list[list[list[int]]] = []
    while len(response) < max_new_tokens:
        context = np.concatenate([prompt, np.array(response, dtype=np.int64)])
        guess = initial_guess(key, len(trajectory), context, block_size)
        block = [following, *guess[1:].tolist()]
        iterates, accepted = [list(block)], 1
        while True:
            # The last accepted token and everything behind it; afterwards the cache keeps what is accepted.
            tail = torch.tensor([block[accepted - 1 :]], device=device)
            written = model(input_ids=tail, past_key_values=cache, use_cache=True).logits[0].argmax(-1).tolist()
            before, following = accepted, written[-1]
            while accepted < block_size and block[accepted] == written[accepted - before]:
                accepted += 1
            if accepted == block_size:
                break
            block[accepted:] = written[accepted - before : -1]
            cache.crop(-(block_size - accepted))
            accepted += 1
            iterates.append(list(block))
        trajectory.append(iterates)
        ends = [i for i, token in enumerate(block) if token == end_id]
        response += block[: ends[0] + 1] if ends else block
        if ends:
            break
    return response, trajectory


@dataclass(frozen=True)
class Interleaved:
    """One sample in the published layout: the prompt, then every block noisy and clean in turn, each n tokens long.

    Blocks are padded to n, so a sample has P + 2 n ceil(R / n) tokens: the response twice, whatever the noise.
    """

    tokens: torch.Tensor
    """int64 [1, L]"""
    positions: torch.Tensor
    """int64 [1, L]: a noisy block has the positions of the clean block that follows it."""
    bias: torch.Tensor
    """What is added to attention scores, 0 or minus infinity; float32 [1, 1, L, L]."""
    clean: torch.Tensor
    """Flat index of each clean position that predicts a response token, int64 [C]."""
    targets: torch.Tensor
    """int64 [C]"""
    noisy: torch.Tensor
    """Flat index of each taught noisy position, int64 [N]."""
    mirrors: torch.Tensor
    """Flat index of the clean position it mirrors, int64 [N]."""


def interleave(sample: Sample, block_size: int, window: int, device: torch.device) -> Interleaved:
    """Lay one of our samples (drawn once) out as published: the same iterates, positions taught and visible context."""
    prompt, n = sample.prompt_length, block_size
    response = sample.stem[prompt:]
    blocks = -(-len(response) // n)
    rank = np.arange(blocks * n)
    streams = np.zeros((2, blocks * n), dtype=np.int64)  # noisy, clean; padding is token 0
    streams[:, : len(response)] = response
    taught = np.zeros(blocks * n, dtype=bool)
    for branch in sample.branches:
        span = slice(branch.start - prompt, branch.start - prompt + len(branch.tokens))
        streams[0, span], taught[span] = branch.tokens, branch.taught
    # In a row: block, noisy or clean, place in the block.
    turned = streams.reshape(2, blocks, n).transpose(1, 0, 2).ravel()
    place = rank.reshape(blocks, 1, n).repeat(2, axis=1).ravel()
    stream = np.arange(2).reshape(1, 2, 1).repeat(blocks, axis=0).repeat(n, axis=2).ravel()
    tokens = np.concatenate([sample.stem[:prompt], turned])
    positions = np.concatenate([np.arange(prompt), prompt + place])
    stream = np.concatenate([np.ones(prompt, np.int64), stream])
    begins = np.where(
        positions < prompt, 0, prompt + (positions - prompt) // (n * (window or blocks)) * n * (window or blocks)
    )
    before = positions[None, :] <= positions[:, None]
    clean_context = (stream[:, None] == 1) | (positions[None, :] < begins[:, None])
    seen = before & np.where(
        stream[None, :] == 1, clean_context, (stream[:, None] == 0) & (positions[None, :] >= begins[:, None])
    )
    bias = np.where(seen, np.float32(0), np.float32(-np.inf))
    index = prompt + (2 * (rank // n)) * n + rank % n
    response_clean = index + n
    clean = np.concatenate([[prompt - 1], response_clean[: len(response) - 1]])
    kept = np.flatnonzero(taught)
    moved = (
        torch.from_numpy(np.ascontiguousarray(a)).to(device)
        for a in (tokens[None], positions[None], bias[None, None], clean, response, index[kept], response_clean[kept])
    )
    return Interleaved(*moved)


def training_loss(model: PreTrainedModel, samples: Sequence[Interleaved], ar_weight: float) -> float:
    """Forward and backward of samples one at a time, gradients accumulated; gives the loss of all of them.

    ``model`` runs transformers' own SDPA attention.
    """
    noisy = sum(len(s.noisy) for s in samples)
    clean = sum(len(s.clean) for s in samples)
    total = 0.0
    for s in samples:
        logits = (
            model(input_ids=s.tokens, position_ids=s.positions, attention_mask=s.bias, use_cache=False)
            .logits[0]
            .float()
        )
        teacher = logits.detach()[s.mirrors].log_softmax(-1)
        consistency = (teacher.exp() * (teacher - logits[s.noisy].log_softmax(-1))).sum() / noisy
        loss = consistency + ar_weight * cross_entropy(logits[s.clean], s.targets, reduction="sum") / clean
        loss.backward()
        total += loss.item()
    return total
