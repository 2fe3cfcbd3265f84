"""Training over two nodes, one of which dies: the ranks wait for room and go on from the last checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from jf_cluster.config import Config
from jf_cluster.tracking import Tracker
from jf_cluster.train import ranks as starting
from jf_cluster.train import train_round
from tests.second_node import one_core_left_here, second_node
from tests.train.conftest import Ranks, at_step, exported, job_of, seal, weights

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.slow
def test_a_node_killed_while_it_trains_changes_nothing_but_the_time(
    configured: Callable[..., Config],
    ranks: Ranks,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank on each of two nodes; when one node is gone nobody has its core, until one is let go here."""
    monkeypatch.setenv(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, "5")
    monkeypatch.setattr(starting, "POLL_S", 0.1)
    config = configured(steps=12)
    seal(config)
    whole = job_of(config, tmp_path / "whole")
    ranks.train(whole, 2)

    with one_core_left_here() as holder, second_node() as node, caplog.at_level(logging.WARNING):

        def power_cut() -> None:
            node.kill()
            while "(2 CPUs needed, 1 of 2 free); waiting for a node" not in caplog.text:
                time.sleep(0.1)
            ray.kill(holder)

        with at_step(config.run_dir / "training" / "round-001.steps.jsonl", 5, power_cut):
            train_round(config, 1, Tracker.open(config))
    assert "restart 1 of 3" in caplog.text and "restart 2 of 3" not in caplog.text
    mine, other = exported(config), weights(whole)
    assert mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)
