"""The published procedures, written afresh from the paper's description, as the other side of the benchmarks.

Collecting: one prompt at a time, block after block, one forward an iteration over the block's remaining tokens with a
key-value cache. Training: one sample a step, a dense mask over clean and noisy tokens, float32 logits of every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from jf_cluster.jacobi.packing import PackedBatch
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


def training_loss(model: PreTrainedModel, samples: Sequence[PackedBatch], ar_weight: float) -> float:
    """Forward and backward of samples one at a time, with gradients accumulated; gives the loss of all of them.

    ``model`` is under ``branch_attention(model, "dense")`` and each batch holds a single sample.
    """
    noisy = sum(s.noisy_tokens for s in samples)
    clean = sum(s.clean_tokens for s in samples)
    total = 0.0
    for s in samples:
        logits = (
            model(input_ids=s.tokens, position_ids=s.forest.position_ids, use_cache=False, layout=s.forest)
            .logits[0]
            .float()
        )
        probabilities = logits.log_softmax(-1)
        teacher = probabilities[s.clean].detach()[s.mirrors]
        consistency = (teacher.exp() * (teacher - probabilities[s.noisy])).sum() / noisy
        loss = consistency + ar_weight * cross_entropy(logits[s.clean], s.targets, reduction="sum") / clean
        loss.backward()
        total += loss.item()
    return total
