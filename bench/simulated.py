"""Collectors whose model only takes its time: real actors, real trajectories, real commits. Part of bench.scale.

Imports neither torch nor transformers, so that hundreds of these actors fit on one machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from typing import NamedTuple

from trajectory_store import Provenance, Trajectory, TrajectoryStore


class _NoPandas(MetaPathFinder):
    """PyArrow would import pandas, 40 MB an actor, to see whether a list is something of pandas."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ImportError("left out")


@dataclass(frozen=True)
class Item:
    prompt_id: str


class Worked(NamedTuple):
    """A batch: which collector had it, the seconds its model took, and those of a commit that came with it."""

    collector: int
    model_s: float
    commit_s: float | None


class Said(NamedTuple):
    """As jf_cluster.collect.dispatch.Report, which cannot be had without torch."""

    result: Worked
    durable: list[str]


class Collector:
    """As jf_cluster.collect.worker.Collector, but for the model: it sleeps as long as a real batch took.

    Args:
        rows: real trajectories, written again and again under other prompt ids.
        batch_s: seconds of real batches, taken in turn.
        commit_every_s: as ``collect.commit_every_s``.
    """

    def __init__(
        self,
        store_url: str,
        provenance: Provenance,
        number: int,
        rows: Sequence[Trajectory],
        batch_s: Sequence[float],
        commit_every_s: float,
    ) -> None:
        sys.meta_path.insert(0, _NoPandas())
        self.number, self.rows, self.batch_s, self.commit_every_s = number, rows, batch_s, commit_every_s
        self.writer = TrajectoryStore(store_url).round(1).writer(provenance, writer_id=f"simulated.{number}")
        self.uncommitted: list[str] = []
        self.committed_at = time.monotonic()
        self.turn = 31 * number  # not all collectors the same latency at the same time

    def ready(self) -> None:
        pass

    def run(self, items: Sequence[Item]) -> Said:
        model_s = self.batch_s[self.turn % len(self.batch_s)]
        self.turn += 1
        time.sleep(model_s)
        for place, item in enumerate(items):
            self.writer.append(replace(self.rows[place % len(self.rows)], prompt_id=item.prompt_id))
            self.uncommitted.append(item.prompt_id)
        if time.monotonic() - self.committed_at < self.commit_every_s:
            return Said(Worked(self.number, model_s, None), [])
        begun = time.monotonic()
        durable = self.finish()
        return Said(Worked(self.number, model_s, time.monotonic() - begun), durable)

    def finish(self) -> list[str]:
        self.writer.commit()
        safe, self.uncommitted, self.committed_at = self.uncommitted, [], time.monotonic()
        return safe
