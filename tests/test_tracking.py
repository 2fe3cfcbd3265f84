"""MLflow with a real SQLite store: nested runs, found again, many writers, and a store that does not answer."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

import jf_cluster.tracking
from jf_cluster.config import Config
from jf_cluster.tracking import StageRun, Tracker


def config_of(directory: Path, uri: str | None = None) -> Config:
    return Config.model_validate({"name": "run", "runs_dir": directory, "tracking": {"uri": uri}})


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run_of(tracker: Tracker, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(tracker.uri).get_run(run_id)


def test_a_resumed_stage_continues_its_run(tmp_path: Path) -> None:
    tracker = Tracker.open(config_of(tmp_path))
    with pytest.raises(RuntimeError, match="boom"), tracker.stage(1, "collect") as first:
        first.metrics({"a": 1.0}, step=3)
        first.params({"x": {"y": 1}})
        raise RuntimeError("boom")
    assert run_of(tracker, first.run_id).info.status == "FAILED"

    again = Tracker.open(config_of(tmp_path))
    assert again.run_id == tracker.run_id
    report = tmp_path / "report.txt"
    report.write_text("text")
    with again.stage(1, "collect") as second:
        assert run_of(again, second.run_id).info.status == "RUNNING"
        assert second.last_step("a") == 3
        second.metrics({"a": 2.0}, step=4)
        second.params({"x": {"y": 2}})
        second.artifact(report)
    run = run_of(again, second.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    assert run.data.metrics == {"a": 2.0}
    assert run.data.params == {"x.y": "1"} and run.data.tags["changed.x.y"] == "2"
    assert run.data.tags["mlflow.parentRunId"] == again.run_id
    assert list((tmp_path / "mlartifacts").rglob("report.txt"))
    with again.stage(2, "collect") as other:
        assert other.run_id != second.run_id


def test_a_run_directory_made_anew_gets_runs_of_its_own(tmp_path: Path) -> None:
    first = Tracker.open(config_of(tmp_path))
    (first.run_dir / "tracking" / "key").unlink()
    assert Tracker.open(config_of(tmp_path)).run_id != first.run_id


def _write(directory: str, worker: int) -> None:
    tracker = Tracker.open(config_of(Path(directory)))  # the first to come creates the data base, all at once
    with tracker.stage(1, "train") as stage:
        attached = StageRun.attach(stage.uri, stage.run_id, stage.journal)
        for step in range(20):
            attached.metrics({f"worker-{worker}": step}, step=step)


def test_processes_that_start_at_once_share_store_and_runs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(str(tmp_path), worker)) for worker in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    tracker = Tracker.open(config_of(tmp_path))
    runs = MlflowClient(tracker.uri).search_runs([tracker.experiment_id], "tags.`jf_cluster.stage` = 'train'")
    recorded = {name: value for run in runs for name, value in run.data.metrics.items()}
    assert recorded == {"worker-0": 19.0, "worker-1": 19.0, "worker-2": 19.0}
    assert not list(tracker.run_dir.glob("tracking/*.jsonl"))


def test_a_store_that_does_not_answer_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker.open(config_of(tmp_path, uri="http://127.0.0.1:9"))
    caplog.clear()
    with caplog.at_level(logging.WARNING), tracker.stage(1, "train") as stage:
        for step in range(50):
            stage.metrics({"loss": 0.5}, step=step)
    assert len(caplog.records) == 1 and "metrics are kept in" in caplog.text
    kept = [json.loads(line) for line in stage.journal.read_text().splitlines()]
    assert [(entry["values"], entry["step"]) for entry in kept] == [({"loss": 0.5}, step) for step in range(50)]


def test_what_could_not_be_sent_is_sent_when_the_store_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jf_cluster.tracking, "RETRY_AFTER_S", 0.0)
    tracker = Tracker.open(config_of(tmp_path))
    with tracker.stage(1, "train") as stage:
        stage.metrics({"loss": 1.0}, step=1)
        reachable, stage.uri = stage.uri, f"sqlite:///{tmp_path}/no/such/directory.db"
        stage.metrics({"loss": 2.0}, step=2)
        stage.uri = reachable
        stage.metrics({"loss": 3.0}, step=3)
    history = MlflowClient(tracker.uri).get_metric_history(stage.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
