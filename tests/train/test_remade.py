"""What the driver says and keeps of a round's training, with real ranks started without Ray; a round made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from jf_cluster.config import Config
from jf_cluster.tracking import Tracker
from jf_cluster.train import TrainingError, driver, train_round
from jf_cluster.train.worker import RankJob, run_rank
from tests.train.conftest import Ranks, exported, job_of, seal, train_runs, weights


@pytest.fixture(autouse=True)
def one_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ranks(config: Config, job: RankJob, storage: Path) -> None:
        ranks.call(run_rank, 1, job)

    monkeypatch.setattr(driver, "run_ranks", run_ranks)


def test_a_round_made_again_has_curves_and_times_of_its_own(
    configured: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(steps=4, workers=1)
    seal(config)
    tracker = Tracker.open(config)
    with caplog.at_level("INFO"):
        train_round(config, 1, tracker)
    assert "training round 1 from model 0: 24 trajectories, 4 steps, 1 ranks" in caplog.text
    first, training = tracker.stage_run(1, "train"), config.run_dir / "training"
    lines = (training / "round-001.steps.jsonl").read_text().splitlines()
    hours = [json.dumps(json.loads(line) | {"seconds": 3600.0}) for line in lines]
    (training / "round-001.steps.jsonl").write_text("\n".join(hours) + "\n")

    # As if killed when the model had just appeared; then somebody removes the model.
    assert first is not None
    MlflowClient(tracker.uri).set_terminated(first, "KILLED")
    shutil.rmtree(config.model_dir(1))
    train_round(config, 1, tracker)
    second = tracker.stage_run(1, "train")
    assert second is not None and second != first
    history = MlflowClient(tracker.uri).get_metric_history(second, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4]
    assert json.loads((training / "round-001.json").read_text())["seconds"] < 3600, "without the first one's"


def test_a_training_that_goes_on_counts_the_steps_before(
    configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between its summary and its model, it has a checkpoint: nothing is forgotten."""

    config = configured(steps=4, workers=1)
    seal(config)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_publish", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_round(config, 1, Tracker.open(config))
    summary = config.run_dir / "training" / "round-001.json"
    steps_s = json.loads(summary.read_text())["step_seconds"]
    train_round(config, 1, Tracker.open(config))
    assert json.loads(summary.read_text())["seconds"] > steps_s


def test_spoilt_data_are_left_out_recorded_and_limited(
    configured: Callable[..., Config], broken_base: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Two samples spoil their step; only one is allowed at first."""
    config = configured(workers=1, model=broken_base, guard={"max_skips": 1})
    seal(config, broken=(2, 3))
    with pytest.raises(TrainingError, match=r"leave data out 2 times, .*raise train\.guard\.max_skips"):
        train_round(config, 1, Tracker.open(config))
    allowed = configured(workers=1, model=broken_base, guard={"max_skips": 2})
    train_round(allowed, 1, Tracker.open(allowed))

    record = config.run_dir / "training" / "round-001.skipped.jsonl"
    skips = [json.loads(line) for line in record.read_text().splitlines()]
    assert "prompt-0003" in skips[0]["prompt_ids"] and "prompt-0002" in skips[1]["prompt_ids"]
    left_out = [prompt_id for skip in skips for prompt_id in skip["prompt_ids"]]
    [run] = train_runs(config)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/skips"] == 2 and run.data.metrics["train/skipped_samples"] == len(left_out)
    assert run.data.tags["skipped_samples"] == ", ".join(left_out)
    summary = json.loads((config.run_dir / "training" / "round-001.json").read_text())
    assert summary["skipped_samples"] == len(left_out) and summary["steps"] == 6

    never = job_of(allowed, tmp_path / "never", identity=skips[0]["identity"])
    shutil.copyfile(record, never.skips)
    assert ranks.train(never, 1) == 1
    torch.testing.assert_close(exported(allowed), weights(never), rtol=0, atol=0, equal_nan=True)


def _interrupted(partial: Path, target: Path) -> None:
    raise KeyboardInterrupt
