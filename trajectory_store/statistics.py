"""Figures of a round: counts, iterations per block, noise ratios, bytes per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trajectory_store.store import Round
from trajectory_store.trajectory import Trajectory

NOISE_BINS = 10


@dataclass(frozen=True)
class RoundStatistics:
    """What a round holds, counted over every row."""

    rows: int
    finished: int
    """Responses that ended by themselves."""
    prompt_tokens: int
    response_tokens: int
    tail_tokens: int
    blocks: int
    iterations: int
    rejects: int
    stored_bytes: int
    iteration_histogram: npt.NDArray[np.int64]
    """Blocks by iterations needed, [block_size + 1]."""
    noise_histogram: npt.NDArray[np.int64]
    """Stored iterates by noise ratio in NOISE_BINS equal bins from 0 to 1, [NOISE_BINS]."""

    @property
    def iterations_per_block(self) -> float:
        return self.iterations / self.blocks if self.blocks else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes per response token."""
        return self.stored_bytes / self.response_tokens if self.response_tokens else 0.0


def round_statistics(round_: Round) -> RoundStatistics:
    """Statistics of a sealed round, every row read."""
    manifest = round_.manifest
    stored = count(round_.reader().scan(), manifest.provenance.block_size, manifest.rejects, manifest.bytes)
    return replace(stored, iterations=manifest.iterations)  # a thinned round stores fewer iterates than there were


def count(rows: Iterable[Trajectory], block_size: int, rejects: int, stored_bytes: int) -> RoundStatistics:
    """Statistics of the given rows."""
    totals: Counter[str] = Counter()
    iteration_histogram = np.zeros(block_size + 1, np.int64)
    noise_histogram = np.zeros(NOISE_BINS, np.int64)
    for row in rows:
        totals["rows"] += 1
        totals["finished"] += row.finished
        totals["prompt_tokens"] += len(row.prompt)
        totals["response_tokens"] += len(row.response)
        totals["tail_tokens"] += len(row.tails)
        totals["blocks"] += len(row.iterations)
        totals["iterations"] += len(row.accepted)
        iteration_histogram += np.bincount(np.minimum(row.iterations, block_size), minlength=block_size + 1)
        lengths = np.repeat(row.block_lengths(block_size), row.iterations)
        noise = 1 - row.accepted / np.maximum(lengths, 1)
        bins = np.minimum((noise * NOISE_BINS).astype(np.int64), NOISE_BINS - 1)
        noise_histogram += np.bincount(bins, minlength=NOISE_BINS)
    return RoundStatistics(
        rows=totals["rows"],
        finished=totals["finished"],
        prompt_tokens=totals["prompt_tokens"],
        response_tokens=totals["response_tokens"],
        tail_tokens=totals["tail_tokens"],
        blocks=totals["blocks"],
        iterations=totals["iterations"],
        rejects=rejects,
        stored_bytes=stored_bytes,
        iteration_histogram=iteration_histogram,
        noise_histogram=noise_histogram,
    )
