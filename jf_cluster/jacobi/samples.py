"""From a stored trajectory to a training sample: which iterates the model sees, and where it is taught.

The response's blocks are cut into windows; over a window the noise ratio aimed at follows a schedule, and each block
shows the iterate whose noise ratio is nearest. A window becomes one noisy branch off the clean stream. Up to the
window's first divergence the branch would repeat the clean stream, so it starts there (the result is the same), and
it ends with the last token that has something to teach.
"""

from __future__ import annotations

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

    @property
    def length(self) -> int:
        return len(self.stem) + sum(len(b.tokens) for b in self.branches)


def build_sample(trajectory: Trajectory, block_size: int, noise: Noise, rng: np.random.Generator) -> Sample:
    """Draw a training sample from a trajectory; the same ``rng`` state gives the same sample.

    With several draws each window is shown several times, with the window grid shifted by a random number of blocks
    from the second draw on, so that a block is met at different noise ratios.
    """
    stem = np.concatenate([trajectory.prompt, trajectory.response]).astype(np.int64)
    lengths = trajectory.block_lengths(block_size)
    prefixes = _accepted_by_block(trajectory)
    branches = []
    for draw in range(noise.draws):
        width = noise.window or max(len(lengths), 1)
        shift = int(rng.integers(width)) if draw else 0
        for first in range(-shift, len(lengths), width):
            targets = noise.targets(width, rng)
            blocks = range(max(first, 0), min(first + width, len(lengths)))
            branch = _branch(trajectory, block_size, blocks, targets[blocks.start - first :], lengths, prefixes)
            if branch is not None:
                branches.append(branch)
    return Sample(len(trajectory.prompt), stem, tuple(branches))


def _accepted_by_block(trajectory: Trajectory) -> list[IntArray]:
    ends: IntArray = np.cumsum(trajectory.iterations, dtype=np.int64)[:-1]
    return np.split(trajectory.accepted.astype(np.int64), ends)


def _branch(
    trajectory: Trajectory,
    block_size: int,
    blocks: range,
    targets: FloatArray,
    lengths: NDArray[np.int32],
    prefixes: list[IntArray],
) -> NoisyBranch | None:
    tokens, taught, ratios = [], [], []
    for block, target in zip(blocks, targets, strict=False):
        length = int(lengths[block])
        accepted = np.append(prefixes[block], length)
        nearest = int(np.abs(1 - accepted / length - target).argmin())
        tokens.append(trajectory.iterate(block, nearest, block_size).astype(np.int64))
        taught.append(np.arange(length) >= accepted[nearest])
        ratios.append(np.full(length, 1 - accepted[nearest] / length))
    token, teach, ratio = np.concatenate(tokens), np.concatenate(taught), np.concatenate(ratios)
    begin = blocks.start * block_size
    if begin + len(token) == len(trajectory.response):
        # Nothing follows the response's last token, so there is nothing to predict from it.
        token, teach, ratio = token[:-1], teach[:-1], ratio[:-1]
    places = np.flatnonzero(teach)
    if not places.size:
        return None
    cut = slice(int(places[0]), int(places[-1]) + 1)
    return NoisyBranch(len(trajectory.prompt) + begin + cut.start, token[cut], teach[cut], ratio[cut])
