"""Micro-batches of the plan as tensors: rows of the store → samples → one packed batch on the rank's device.

What is drawn for a sample is keyed by (seed, round, epoch, prompt id), never by a generator that remembers: a
restarted rank, or another rank, builds the same sample.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from jf_cluster.config import Config
from jf_cluster.jacobi.packing import PackedBatch, collate
from jf_cluster.jacobi.samples import Noise, build_sample, sample_length
from jf_cluster.train.plan import MicroBatch, TrainingPlan
from jf_cluster.train.sharing import Work, alone

if TYPE_CHECKING:
    from trajectory_store import Rows, Trajectory

Wait = Callable[["Future[PlannedStep]"], bool]
"""Waits for a step's batches together with the other ranks; False when there is to be no such step."""


def sample_rng(seed: int, round_number: int, epoch: int, prompt_id: str) -> np.random.Generator:
    """Counter-based generator of one sample's draws in one epoch."""
    key = int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, round_number, epoch, key))))


@dataclass(frozen=True)
class PlannedStep:
    """An optimizer step (from 0): what all ranks forward together, and one rank's share of it as batches."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    batches: list[PackedBatch]


class BatchSource:
    """Builds the micro-batches of one rank, the next step's while the current one is being computed."""

    def __init__(
        self,
        rows: Rows,
        config: Config,
        round_number: int,
        device: torch.device,
        share: Callable[[int, Work], NDArray[np.int64]] = alone,
    ) -> None:
        """``share`` has the ranks look at each other's rows instead of all at all; see jf_cluster.train.sharing."""
        self._rows, self._seed, self._round, self._device = rows, config.seed, round_number, device
        self._noise = Noise(**config.noise.model_dump())
        self._share = share

    def lengths(self, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Exact tokens of each row's sample in an epoch, int64[R]: what the plan packs by.

        It is 0 for prompts given up on and for empty responses, which teach nothing.

        The draw is keyed, so it can be made ahead, by whatever rank, and only its length kept.
        """

        def of(part: slice) -> NDArray[np.int64]:
            # All rows are waited for, not this rank's only: who has them would wait for the others' in their exchange,
            # which has a time limit.
            present = self._rows.present(rows)[part]
            lengths = np.zeros(len(present), dtype=np.int64)
            for i in np.flatnonzero(present):
                trajectory, *drawn = self._drawn_from(epoch, int(rows[part][i]))
                if len(trajectory.response):
                    lengths[i] = sample_length(trajectory, *drawn)
            return lengths

        return self._share(len(rows), of)

    def _drawn_from(self, epoch: int, row: int) -> tuple[Trajectory, int, Noise, np.random.Generator]:
        trajectory = self._rows[row]
        rng = sample_rng(self._seed, self._round, epoch, trajectory.prompt_id)
        return trajectory, self._rows.provenance_of(row).block_size, self._noise, rng

    def batch(self, micro_batch: MicroBatch) -> PackedBatch:
        """One packed batch on the device."""
        samples = [build_sample(*self._drawn_from(micro_batch.epoch, row)) for row in micro_batch.rows]
        return collate(samples).to(self._device)

    def steps(
        self, plan: TrainingPlan, first: int, last: int, rank: int, world_size: int, wait: Wait = lambda _: True
    ) -> Generator[PlannedStep, None, None]:
        """Yield steps ``first`` to ``last - 1`` with the batches of ``rank``, one step ahead, while ``wait`` agrees."""

        def build(step: int) -> PlannedStep:
            share = plan.share(step, rank, world_size)
            return PlannedStep(step, plan.step(step), [self.batch(micro_batch) for micro_batch in share])

        waiting: deque[Future[PlannedStep]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            try:
                for following in range(first, last + 1):
                    if following < last:
                        waiting.append(pool.submit(build, following))
                    if following > first:
                        if not wait(waiting[0]):
                            return
                        yield waiting.popleft().result()
            finally:
                self._rows.give_up()  # the pool's thread may be waiting for rows nobody wants any more
