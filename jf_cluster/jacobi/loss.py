"""The Jacobi Forcing loss: consistency of noisy positions with the clean positions they mirror, plus next-token loss.

One forward over the clean stream and its noisy branches gives hidden states; the vocabulary-sized tensors exist only
for a chunk of positions at a time and are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from jf_cluster.jacobi.packing import RATIO_BUCKETS, PackedBatch
from jf_cluster.jacobi.sampling import most_likely
from jf_cluster.jacobi.support import output_head


@dataclass(frozen=True)
class ForcingLoss:
    """Sums over one micro-batch; the sums carry gradients, the counts beside them do not.

    Keeping sums apart from counts lets a trainer normalise over a whole optimizer step, so the result does not
    depend on how its samples were spread over micro-batches and ranks.
    """

    consistency_sum: torch.Tensor
    """KL divergence of noisy from clean distributions, summed over noisy positions, in nats."""
    ar_sum: torch.Tensor
    """Next-token cross-entropy on the clean response, summed, in nats."""
    consistency_tokens: int
    ar_tokens: int
    agreements: torch.Tensor
    """Noisy positions whose most likely token is the clean position's."""
    bucket_sums: torch.Tensor
    """``consistency_sum`` by noise-ratio bucket, [RATIO_BUCKETS], detached."""
    bucket_tokens: torch.Tensor

    def total(self, ar_weight: float) -> torch.Tensor:
        """``consistency + ar_weight * ar``, each a mean over its positions."""
        return self.consistency_sum / max(self.consistency_tokens, 1) + ar_weight * self.ar_sum / max(self.ar_tokens, 1)


def forcing_loss(model: PreTrainedModel, batch: PackedBatch, *, chunk_tokens: int = 1024) -> ForcingLoss:
    """Run a micro-batch through ``model`` (already under ``branch_attention``) and sum its losses.

    The teacher is the clean position's distribution of the same forward, without gradient. Whatever the number of
    positions, logits exist for about ``chunk_tokens`` of them at a time (at least one clean position and its mirrors).
    """
    hidden = model.base_model(
        input_ids=batch.tokens, position_ids=batch.forest.position_ids, use_cache=False, layout=batch.forest
    ).last_hidden_state[0]
    clean, noisy = hidden.index_select(0, batch.clean), hidden.index_select(0, batch.noisy)
    head = output_head(model)
    sums = []
    chunks = list(_chunks(batch.mirrors, batch.clean_tokens, chunk_tokens))
    for c, n in chunks:
        arguments = (head, clean[c], noisy[n], batch.targets[c], batch.mirrors[n] - c.start, batch.buckets[n])
        if len(chunks) == 1 or not torch.is_grad_enabled():
            sums.append(_chunk_sums(*arguments))
        else:
            sums.append(checkpoint(_chunk_sums, *arguments, use_reentrant=False))
    ar, buckets, agreements = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    return ForcingLoss(
        buckets.sum(),
        ar,
        batch.noisy_tokens,
        batch.clean_tokens,
        agreements,
        buckets.detach(),
        torch.bincount(batch.buckets, minlength=RATIO_BUCKETS),
    )


def _chunks(mirrors: torch.Tensor, clean_tokens: int, chunk_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Cut clean positions and the noisy positions that mirror them into pieces of about ``chunk_tokens``."""
    # With the noisy positions of the first i clean positions counted, `ends[i]` positions come before clean position i.
    bounds = torch.arange(clean_tokens + 1, device=mirrors.device)
    before = torch.searchsorted(mirrors, bounds).tolist()
    start = 0
    for stop in range(1, clean_tokens + 1):
        size = stop - start + before[stop] - before[start]
        following = 1 + before[stop + 1] - before[stop] if stop < clean_tokens else 0
        if stop == clean_tokens or size + following > chunk_tokens:
            yield slice(start, stop), slice(before[start], before[stop])
            start = stop


def _chunk_sums(
    head: Callable[[torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    noisy: torch.Tensor,
    targets: torch.Tensor,
    mirrors: torch.Tensor,
    buckets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(ar sum, consistency sum by bucket, agreements)`` of one chunk of hidden states, [C, width] and [N, width]."""
    # One application of the head: the gradient of its weight is as large as the weight, and so exists once a chunk.
    logits = head(torch.cat([clean, noisy])).float()
    clean_logits, noisy_logits = torch.split(logits, [len(clean), len(noisy)])
    ar = cross_entropy(clean_logits, targets, reduction="sum")
    teacher = clean_logits.detach().log_softmax(-1).index_select(0, mirrors)
    divergence: torch.Tensor = _Divergence.apply(noisy_logits, teacher)  # type: ignore[no-untyped-call]
    by_bucket = torch.zeros(RATIO_BUCKETS, device=divergence.device).index_add(0, buckets, divergence)
    agreements = (most_likely(noisy_logits.detach()) == most_likely(teacher)).sum()
    return ar, by_bucket, agreements


class _Divergence(torch.autograd.Function):
    """KL(teacher, student) of every position, [N], from student logits and teacher log-probabilities, [N, V] each.

    Of everything it computes it keeps the one tensor its gradient consists of, where autograd would keep three.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_probabilities, target = student.log_softmax(-1), teacher.exp()
        divergence = (teacher - log_probabilities).mul_(target).sum(-1)
        ctx.save_for_backward(log_probabilities.exp_().sub_(target))
        return divergence

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradient[:, None], None
