"""Collectors that break: what the tests put in the place of the real one. Besides, they do the real work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.collect.worker import Collector, Counts


def first(path: Path) -> bool:
    """Whether this is the first call with this path, over all processes."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class KilledOnce(Collector):
    """The first worker to see its second batch is killed with the first still uncommitted."""

    batches = 0

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        self.batches += 1
        if self.batches == 2 and first(self.config.runs_dir / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(prompts)


class Poisoned(Collector):
    """Dies of one prompt, every time."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        if any(p.prompt_id == (self.config.runs_dir / "poison").read_text() for p in prompts):
            os._exit(1)
        return super().run(prompts)


class Failing(Collector):
    """Raises on one prompt, every time, without dying."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        if any(p.prompt_id == (self.config.runs_dir / "poison").read_text() for p in prompts):
            raise ValueError("this prompt is bad")
        return super().run(prompts)


class HungOnce(Collector):
    """The first batch of all never ends."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        if first(self.config.runs_dir / "hung"):
            time.sleep(3600)
        return super().run(prompts)


class OnDoomedNode(Collector):
    """On one node the second batch never ends, and the first is uncommitted; the others wait until it is so far."""

    batches = 0

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        self.batches += 1
        hangs = self.config.runs_dir / "hangs"
        if ray.get_runtime_context().get_node_id() == (self.config.runs_dir / "doomed").read_text():
            if self.batches == 2:
                hangs.touch()
                time.sleep(3600)
        else:
            while not hangs.exists():
                time.sleep(0.05)
        return super().run(prompts)


class KillsTheDashboard(Collector):
    """The first batch of all ends with the death of MLflow's server, all its processes at once."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        done = super().run(prompts)
        if first(self.config.runs_dir / "killed"):
            os.killpg(int((self.config.runs_dir / "server").read_text()), signal.SIGKILL)
        return done


class FullDisk(Collector):
    """Finds the disk full when it commits."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        raise OSError(28, "No space left on device")
