"""Keeping only the iterates that a noise schedule can choose.

A schedule aims at a fixed set of noise ratios and takes each block's nearest iterate. Iterates that are nearest to none
of them will never be trained on; with windows shorter than the block size they are most of what a store holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trajectory_store.trajectory import Trajectory


def thinned(trajectory: Trajectory, block_size: int, noise_ratios: Sequence[float]) -> Trajectory:
    """The trajectory with each block reduced to the iterates nearest to one of the ratios.

    `iterations` of the result counts the stored iterates, not those the block needed. The nearest iterate to each of
    the ratios (the fixed point has ratio 0; of equally near ones the earliest) is the same as before.
    """
    targets = np.asarray(noise_ratios, np.float64)
    lengths = trajectory.block_lengths(block_size)
    ends = np.cumsum(trajectory.iterations, dtype=np.int64)
    keep = np.zeros(len(trajectory.accepted), bool)
    for length, steps, end in zip(lengths.tolist(), trajectory.iterations.tolist(), ends.tolist(), strict=True):
        ratios = np.append(1 - trajectory.accepted[end - steps : end] / length, 0.0)
        nearest = np.abs(ratios[None, :] - targets[:, None]).argmin(axis=1)
        keep[end - steps + nearest[nearest < steps]] = True
    tail_lengths = np.repeat(lengths, trajectory.iterations) - trajectory.accepted
    owner = np.repeat(np.arange(len(lengths)), trajectory.iterations)
    return replace(
        trajectory,
        iterations=np.bincount(owner[keep], minlength=len(lengths)).astype(np.int32),
        accepted=trajectory.accepted[keep],
        tails=trajectory.tails[np.repeat(keep, tail_lengths)],
    )
