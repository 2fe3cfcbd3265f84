"""How often ranks that fail are started again: as long as they come further, and a few times where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train

from jf_cluster.config import Config
from jf_cluster.train import ranks
from jf_cluster.train.checkpoints import Checkpoint
from jf_cluster.train.ranks import TrainingError, run_ranks
from tests.train.conftest import job_of


@pytest.mark.parametrize(("comes_to", "starts"), [([0] * 9, 3), ([1, 2, 3, 4, 4, 4, 4], 6), ([1, 1, 2, 2, 3, 3], 6)])
def test_restarts_count_from_the_last_checkpoint(
    configured: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    comes_to: list[int],
    starts: int,
) -> None:
    """Two restarts are allowed; the numbers are the last checkpoint after each start, which then fails."""
    config, job = configured(max_restarts=2), job_of(configured(), tmp_path / "job")
    started = itertools.count()
    saved: list[Checkpoint] = []

    def fails(*_: object) -> None:
        number = next(started)
        if number == len(comes_to):
            return
        saved.append(Checkpoint(comes_to[number], 2, job.identity))
        raise ray.train.WorkerGroupError("lost", {0: RuntimeError("its node is gone")})

    monkeypatch.setattr(ranks, "_start", fails)
    monkeypatch.setattr(ranks, "whole_checkpoints", lambda _: saved)
    if comes_to[-1] == 3:
        run_ranks(config, job, tmp_path)
        assert next(started) == starts + 1
        return
    with pytest.raises(TrainingError, match=r"failed after 2 restart\(s\) that came to no newer checkpoint"):
        run_ranks(config, job, tmp_path)
    assert next(started) == starts
