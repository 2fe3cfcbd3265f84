"""One optimizer step over all ranks, weighted so that the result does not depend on how many ranks share it.

The losses are means per token over the whole step: sums of all micro-batches of all ranks divided by counts of all
micro-batches of all ranks. A mean of per-rank means would weigh a token by the company it happens to be in.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from jf_cluster.jacobi.packing import RATIO_BUCKETS

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from jf_cluster.jacobi.packing import PackedBatch


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over all ranks; losses are means per token."""

    loss: float
    consistency: float
    ar: float
    agreement: float
    gradient_norm: float
    tokens: int
    consistency_by_ratio: tuple[float | None, ...]
    """Consistency loss by noise ratio of the block, in RATIO_BUCKETS equal steps; None where there was no token."""
    finite: tuple[bool, ...]
    """Whether this rank's micro-batches, one by one, gave finite losses."""


def train_step(engine: DeepSpeedEngine, batches: list[PackedBatch], ar_weight: float) -> StepResult:
    """Forward, backward and update; every rank calls it with its share of the step's micro-batches."""
    device = engine.device
    counts = torch.stack([_counts(b) for b in batches]).to(device).sum(dim=0)
    dist.all_reduce(counts)
    # DeepSpeed averages over the ranks and over the accumulated micro-batches; the losses are already over all.
    undo_mean = dist.get_world_size() * engine.gradient_accumulation_steps()
    weights = torch.stack((1.0 / counts[0].clamp(min=1), ar_weight / counts[1].clamp(min=1))) * undo_mean
    sums = torch.zeros(3 + RATIO_BUCKETS, dtype=torch.float64, device=device)
    finite = []
    for batch in batches:
        loss, parts = engine(batch, weights)
        engine.backward(loss)
        sums += parts
        finite.append(parts.isfinite().all())
        engine.step()
    dist.all_reduce(sums)
    consistency, ar = sums[0] / counts[0].clamp(min=1), sums[1] / counts[1].clamp(min=1)
    return StepResult(
        loss=float(consistency + ar_weight * ar),
        consistency=float(consistency),
        ar=float(ar),
        agreement=float(sums[2] / counts[0].clamp(min=1)),
        gradient_norm=float(engine.get_global_grad_norm()),
        tokens=int(counts[2]),
        consistency_by_ratio=tuple(
            total / count if count else None
            for total, count in zip(sums[3:].tolist(), counts[3:].tolist(), strict=True)
        ),
        finite=tuple(torch.stack(finite).tolist()),
    )


def _counts(batch: PackedBatch) -> torch.Tensor:
    """Noisy, clean and all tokens, then noisy ones by noise ratio; float64[3 + RATIO_BUCKETS]."""
    by_ratio = torch.bincount(batch.buckets, minlength=RATIO_BUCKETS).double()
    return torch.cat([by_ratio.new_tensor([batch.noisy_tokens, batch.clean_tokens, batch.total_tokens]), by_ratio])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has had so far: the accelerator's allocations, or the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
