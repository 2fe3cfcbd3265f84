"""From a stored trajectory to a training sample: which iterates the model sees, and where it is taught.

The response's blocks are cut into windows; over a window the noise ratio aimed at follows a schedule, and each block
shows the iterate whose noise ratio is nearest. A window becomes one noisy branch off the clean stream. Up to the
window's first divergence the branch would repeat the clean stream, so it starts there (the result is the same), and
it ends with the last token that has something to teach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trajectory_store import Trajectory

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Schedule = Literal["progressive", "reverse", "random", "constant"]


@dataclass(frozen=True)
class Noise:
    """The noise schedule: how the ratio aimed at changes over a window of ``window`` blocks (0: the whole response)."""

    schedule: Schedule = "progressive"
    t_min: float = 0.0
    t_max: float = 1.0
    window: int = 16
    draws: int = 1

    def targets(self, blocks: int, rng: np.random.Generator) -> FloatArray:
        """Noise ratios aimed at by the blocks of one window, float64 [blocks].

        ``progressive`` climbs from t_min to t_max (Jacobi Forcing, section 3.2), ``reverse`` falls, ``random`` draws
        uniformly for each block, ``constant`` is t_max throughout. A window of one block has nothing to climb over and
        draws uniformly.
        """
        if self.schedule == "constant":
            return np.full(blocks, self.t_max)
        if self.schedule == "random" or blocks == 1:
            return rng.uniform(self.t_min, self.t_max, size=blocks)
        climb = np.linspace(self.t_min, self.t_max, blocks)
        return climb if self.schedule == "progressive" else climb[::-1]


@dataclass(frozen=True)
class NoisyBranch:
    """One window of chosen iterates, hanging off the clean stream at stem position ``start``."""

    start: int
    tokens: IntArray
    taught: NDArray[np.bool_]
    """Which tokens' next-token distributions are drawn to the clean stream's, bool [length]."""
    ratios: FloatArray
    """Noise ratio of the block each token belongs to, float64 [length]."""


@dataclass(frozen=True)
class Sample:
    """A clean stream and its noisy branches; ``length`` counts all their tokens."""

    prompt_length: int
    stem: IntArray
    branches: tuple[NoisyBranch, ...]
    """In the order in which they begin."""

    @property
    def length(self) -> int:
        return len(self.stem) + sum(len(b.tokens) for b in self.branches)


def build_sample(trajectory: Trajectory, block_size: int, noise: Noise, rng: np.random.Generator) -> Sample:
    """Draw a training sample from a trajectory; the same ``rng`` state gives the same sample.

    With several draws each window is shown several times, with the window grid shifted by a random number of blocks
    from the second draw on, so that a block is met at different noise ratios.
    """
    stem = np.concatenate([trajectory.prompt, trajectory.response]).astype(np.int64)
    branches = (_branch(trajectory, block_size, w) for w in _windows(trajectory, block_size, noise, rng))
    return Sample(len(trajectory.prompt), stem, tuple(sorted(branches, key=lambda b: b.start)))


def sample_length(trajectory: Trajectory, block_size: int, noise: Noise, rng: np.random.Generator) -> int:
    """Length of the sample ``build_sample`` draws from the same ``rng`` state, without building it."""
    noisy = sum(w.end - w.begin for w in _windows(trajectory, block_size, noise, rng))
    return len(trajectory.prompt) + len(trajectory.response) + noisy


@dataclass(frozen=True)
class _Window:
    """What a branch shows: which iterate of which blocks, cut to the response positions ``begin`` … ``end - 1``."""

    blocks: range
    iterates: IntArray
    """Number of the iterate shown of each block."""
    accepted: IntArray
    """Its accepted prefix."""
    lengths: IntArray
    begin: int
    end: int


def _windows(trajectory: Trajectory, block_size: int, noise: Noise, rng: np.random.Generator) -> Iterator[_Window]:
    """Choose the iterates of every window of every draw; windows with nothing to teach are left out."""
    lengths = trajectory.block_lengths(block_size).astype(np.int64)
    prefixes = np.split(trajectory.accepted.astype(np.int64), np.cumsum(trajectory.iterations, dtype=np.int64)[:-1])
    width = noise.window or max(len(lengths), 1)
    # Nothing follows the response's last token, so there is nothing to predict from it.
    last = len(trajectory.response) - 1
    for draw in range(noise.draws):
        shift = int(rng.integers(width)) if draw else 0
        for first in range(-shift, len(lengths), width):
            targets = noise.targets(width, rng)
            blocks = range(max(first, 0), min(first + width, len(lengths)))
            iterates, accepted = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
            for i, block in enumerate(blocks):
                known = np.append(prefixes[block], lengths[block])
                target = targets[block - first]
                iterates[i] = np.abs(1 - known / lengths[block] - target).argmin()
                accepted[i] = known[iterates[i]]
            starts = np.array(blocks, dtype=np.int64) * block_size
            begins, ends = starts + accepted, np.minimum(starts + lengths[blocks.start : blocks.stop], last)
            teaching = np.flatnonzero(begins < ends)
            if teaching.size:
                begin, end = int(begins[teaching[0]]), int(ends[teaching[-1]])
                yield _Window(blocks, iterates, accepted, lengths[blocks.start : blocks.stop], begin, end)


def _branch(trajectory: Trajectory, block_size: int, window: _Window) -> NoisyBranch:
    tokens, taught, ratios = [], [], []
    shown = zip(window.blocks, window.iterates.tolist(), window.accepted.tolist(), window.lengths.tolist(), strict=True)
    for block, iterate, accepted, length in shown:
        tokens.append(trajectory.iterate(block, iterate, block_size).astype(np.int64))
        taught.append(np.arange(length) >= accepted)
        ratios.append(np.full(length, 1 - accepted / length))
    origin = window.blocks.start * block_size
    cut = slice(window.begin - origin, window.end - origin)
    start = len(trajectory.prompt) + window.begin
    return NoisyBranch(start, np.concatenate(tokens)[cut], np.concatenate(taught)[cut], np.concatenate(ratios)[cut])
