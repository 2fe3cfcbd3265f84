"""Packing: whole samples into micro-batches by token budget, and a micro-batch as tensors."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from jf_cluster.jacobi.layout import Branch, Forest
from jf_cluster.jacobi.samples import Sample

RATIO_BUCKETS = 4
"""Metrics tell noisy tokens apart by noise ratio in this many equal steps from 0 to 1."""


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack samples into as few micro-batches as best fit, longest first, finds.

    Samples are never cut: one longer than the budget has a micro-batch to itself.

    Returns:
        Sample indices of each micro-batch, ascending; micro-batches in the order of their first sample.
    """
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), sorted
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([index])
            bisect.insort(room, (budget - length, len(bins) - 1))
        else:
            left, chosen = room.pop(at)
            bins[chosen].append(index)
            bisect.insort(room, (left - length, chosen))
    return sorted(sorted(b) for b in bins)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: several samples as one flat forest, and what is taught where.

    The clean positions taught are those that predict a response token. Noisy positions are sorted by the clean
    position they mirror, so that a run of clean positions and its noisy mirrors can be handled together.
    """

    forest: Forest
    tokens: torch.Tensor
    """int64 [1, T]"""
    clean: torch.Tensor
    """Flat index of each taught clean position, int64 [C]."""
    targets: torch.Tensor
    """The response token that follows it, int64 [C]."""
    noisy: torch.Tensor
    """Flat index of each taught noisy position, int64 [N]."""
    mirrors: torch.Tensor
    """For each noisy position the index into ``clean`` of the position it mirrors, int64 [N], ascending."""
    buckets: torch.Tensor
    """Noise-ratio bucket of each noisy position, int64 [N]."""

    def to(self, device: torch.device) -> PackedBatch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved)

    @property
    def clean_tokens(self) -> int:
        return len(self.clean)

    @property
    def noisy_tokens(self) -> int:
        return len(self.noisy)

    @property
    def total_tokens(self) -> int:
        return self.forest.total_tokens


def collate(samples: Sequence[Sample]) -> PackedBatch:
    """Lay samples out as one flat forest; samples never see each other."""
    forest = Forest(
        tuple(len(s.stem) for s in samples),
        tuple(Branch(i, b.start, len(b.tokens)) for i, s in enumerate(samples) for b in s.branches),
    )
    noisy_tokens = [b.tokens for s in samples for b in s.branches]
    clean, targets, first_clean = [], [], []
    count = 0
    for offset, s in zip(forest.stem_offsets[:-1], samples, strict=True):
        response = np.arange(s.prompt_length, len(s.stem))
        clean.append(offset + response - 1)
        targets.append(s.stem[response])
        # Stem position p predicts p + 1, so position p is number p - (prompt_length - 1) among this sample's.
        first_clean.append(count - (s.prompt_length - 1))
        count += len(response)
    noisy, mirrors, ratios = [], [], []
    owners = [(i, b) for i, s in enumerate(samples) for b in s.branches]
    for offset, (i, b) in zip(forest.branch_offsets[:-1], owners, strict=True):
        places = np.flatnonzero(b.taught)
        noisy.append(offset + places)
        mirrors.append(first_clean[i] + b.start + places)
        ratios.append(b.ratios[places])
    noisy_index, mirror = _joined(noisy), _joined(mirrors)
    bucket = np.minimum((np.concatenate([*ratios, np.zeros(0)]) * RATIO_BUCKETS).astype(np.int64), RATIO_BUCKETS - 1)
    order = np.argsort(mirror, kind="stable")
    tokens = np.concatenate([*(s.stem for s in samples), *noisy_tokens])
    return PackedBatch(
        forest,
        torch.from_numpy(tokens)[None],
        torch.from_numpy(_joined(clean)),
        torch.from_numpy(_joined(targets)),
        torch.from_numpy(noisy_index[order]),
        torch.from_numpy(mirror[order]),
        torch.from_numpy(bucket[order]),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int64)
