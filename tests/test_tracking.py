"""MLflow with a real SQLite store: nested runs, found again, many writers, and a store that does not answer."""

from __future__ import annotations

import json
import logging
import multiprocessing
import sqlite3
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from bench.tracking import cost
from jf_cluster.config import Config
from jf_cluster.tracking import StageRun, Tracker, stage_run, system
from jf_cluster.tracking.store import SUPERSEDED_BY, experiment_id


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
        assert second.steps_of("a") == {3}
        second.metrics({"a": 2.0}, step=4)
        second.params({"x": {"y": 2}})
        second.artifact(report)
    run = run_of(again, second.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    assert run.data.metrics["a"] == 2.0
    assert run.data.params == {"x.y": "1"} and run.data.tags["changed.x.y"] == "2"
    assert run.data.tags["mlflow.parentRunId"] == again.run_id
    assert list((tmp_path / "mlartifacts").rglob("report.txt"))
    with again.stage(2, "collect") as other:
        assert other.run_id != second.run_id


def test_a_stage_made_again_has_a_run_of_its_own(tmp_path: Path) -> None:
    """What was recorded of the first output is no part of the second one's curves."""
    tracker = Tracker.open(config_of(tmp_path))
    with tracker.stage(1, "train") as first:
        first.metrics({"train/loss": 1.0}, step=1)
    with pytest.raises(RuntimeError, match="boom"), tracker.stage(1, "train") as second:
        assert second.run_id != first.run_id and second.steps_of("train/loss") == set()
        raise RuntimeError("boom")
    with tracker.stage(1, "train") as resumed:
        assert resumed.run_id == second.run_id == tracker.stage_run(1, "train")
    assert run_of(tracker, first.run_id).data.tags[SUPERSEDED_BY] == second.run_id
    assert SUPERSEDED_BY not in run_of(tracker, second.run_id).data.tags


def test_a_run_directory_made_anew_gets_runs_of_its_own(tmp_path: Path) -> None:
    first = Tracker.open(config_of(tmp_path))
    (first.run_dir / "tracking" / "key").unlink()
    assert Tracker.open(config_of(tmp_path)).run_id != first.run_id


def test_files_of_an_experiment_stay_under_the_runs(tmp_path: Path) -> None:
    """Its name may be a path, as on servers where it has to be one."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    found = MlflowClient(uri).get_experiment(experiment_id(uri, "/Users/me/here", tmp_path))
    assert found.name == "/Users/me/here"
    assert found.artifact_location == (tmp_path / "mlartifacts" / "Users" / "me" / "here").as_uri()


POINTS = 12
WRITERS = ("rank-0", "rank-1", "actor-0", "actor-1", "actor-2", "actor-3")


def _write(directory: str, writer: str) -> None:
    """What a rank or an actor would do at its worst: a request for every point, all writers at the same time."""
    tracker = Tracker.open(config_of(Path(directory)))  # the first to come creates the data base, all at once
    run = StageRun.attach(tracker.uri, tracker.run_id, Path(directory) / f"{writer}.jsonl")
    for step in range(POINTS):
        begun = time.perf_counter()
        run.metrics({f"{writer}/value": step})
        run.flush()
        run.metrics({f"{writer}/seconds": time.perf_counter() - begun}, step=step)
        run.flush()


def test_many_writers_neither_corrupt_nor_slow_the_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(str(tmp_path), writer)) for writer in WRITERS]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * len(WRITERS)
    tracker = Tracker.open(config_of(tmp_path))
    client = MlflowClient(tracker.uri)
    runs = [run.info.run_id for run in client.search_runs([tracker.experiment_id])]

    def recorded(metric: str) -> list[float]:
        return sorted(point.value for run_id in runs for point in client.get_metric_history(run_id, metric))

    for writer in WRITERS:
        assert recorded(f"{writer}/value") == list(range(POINTS)), "every point once"
        seconds = recorded(f"{writer}/seconds")
        assert len(seconds) == POINTS
        # Alone a request takes 20 ms; six writers wait for each other, not until a lock's timeout (sqlite3's: 5 s).
        assert seconds[POINTS // 2] < 5.0 and seconds[-1] < 30.0
    assert not list(tmp_path.rglob("*.jsonl")), "nothing had to be kept back"
    with sqlite3.connect(tmp_path / "mlflow.db") as data_base:
        assert data_base.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_points_that_come_fast_travel_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    send = stage_run._send
    monkeypatch.setattr(
        stage_run, "_send", lambda uri, run, batch: (requests.append(len(batch)), send(uri, run, batch))
    )
    tracker = Tracker.open(config_of(tmp_path))
    requests.clear()
    run = StageRun.attach(tracker.uri, tracker.run_id, tmp_path / "journal.jsonl")
    for step in range(500):
        run.metrics({"a": step, "b": 0, "c": 0}, step=step)
    run.flush()
    assert requests[0] == 1, "the first is shown at once"
    assert sum(requests) == 500 and len(requests) <= 4, "at most 1,000 values a request"
    assert run.steps_of("a") == set(range(500))


def test_tracking_costs_a_step_little(tmp_path: Path) -> None:
    """The driver's processor time. bench.tracking measures it alone; beside other tests it may be three times that."""
    cost(2, step_s=0.1, send_every_s=0.0)  # imports and the first connection are not tracking
    a_request_a_step, _ = cost(12, step_s=0.4, send_every_s=0.0)
    share, append_s = cost(12, step_s=0.4, send_every_s=stage_run.SEND_EVERY_S)
    assert share < a_request_a_step
    assert share < 0.05 and append_s < 0.01


def test_every_machine_tells_its_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SAMPLE_EVERY_S", 0.2)
    tracker = Tracker.open(config_of(tmp_path))
    for ends in (KeyboardInterrupt, None):  # resumed once
        with suppress(KeyboardInterrupt), tracker.stage(1, "train") as stage:
            time.sleep(0.5)
            if ends is not None:
                raise ends
    history = MlflowClient(tracker.uri).get_metric_history(stage.run_id, "system/cpu_utilization_percentage")
    assert [point.step for point in history] == list(range(len(history))) and len(history) >= 4
    names = run_of(tracker, stage.run_id).data.metrics
    assert {"system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= names.keys()


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
    assert [(entry["values"], entry["step"]) for entry in kept[:-1]] == [({"loss": 0.5}, step) for step in range(50)]
    assert kept[-1]["values"] == {"status": "FINISHED"}


def test_what_could_not_be_sent_is_sent_when_the_store_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_run, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(stage_run, "SEND_EVERY_S", 0.0)
    tracker = Tracker.open(config_of(tmp_path))
    with tracker.stage(1, "train") as stage:
        stage.metrics({"loss": 1.0}, step=1)
        reachable, stage.uri = stage.uri, f"sqlite:///{tmp_path}/no/such/directory.db"
        stage.metrics({"loss": 2.0}, step=2)
        stage.uri = reachable
        stage.metrics({"loss": 3.0}, step=3)
        assert not stage.journal.exists(), "what was sent is not kept"
    history = MlflowClient(tracker.uri).get_metric_history(stage.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_a_process_had_to_keep_is_sent_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unreachable = Tracker.open(config_of(tmp_path, uri="http://127.0.0.1:9"))
    with unreachable.stage(1, "collect") as stage:
        stage.metrics({"rows": 7.0}, step=3)
        stage.tags({"store_hash": "abc"})
    assert stage.run_id is None and stage.journal.exists()

    tracker = Tracker.open(config_of(tmp_path))
    tracker.close_abandoned()
    run = run_of(tracker, tracker.stage_run(1, "collect"))
    assert run.info.status == "FINISHED" and run.data.tags["store_hash"] == "abc"
    assert "system/cpu_utilization_percentage" in run.data.metrics and run.data.metrics["rows"] == 7.0
    assert not list(tmp_path.rglob("tracking/*.jsonl"))


def with_an_s3_artifact_root(directory: Path) -> Config:
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    MlflowClient(uri).create_experiment("jacobi-forcing/run", artifact_location="s3://bucket/artifacts")
    return config_of(directory, uri)


@pytest.mark.parametrize("missing", ["library", "credentials"])
def test_an_artifact_store_that_cannot_be_used_costs_one_warning(
    missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "library":
        monkeypatch.setitem(sys.modules, "boto3", None)
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    tracker = Tracker.open(with_an_s3_artifact_root(tmp_path))
    (tmp_path / "first.json").write_text("{}")
    (tmp_path / "second.json").write_text("{}")
    with caplog.at_level(logging.WARNING), tracker.stage(1, "train") as stage:
        stage.artifact(tmp_path / "first.json")
        stage.artifact(tmp_path / "second.json")
        stage.metrics({"loss": 1.0}, step=1)
    assert len(caplog.records) == 1 and "first.json is not copied to MLflow" in caplog.text
    run = run_of(tracker, stage.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1.0
    assert not stage.journal.exists()


def test_a_file_that_is_gone_holds_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.open(config_of(tmp_path))
    with caplog.at_level(logging.WARNING), tracker.stage(1, "train") as stage:
        stage.artifact(tmp_path / "gone.json")
        stage.metrics({"loss": 1.0}, step=1)
    assert len(caplog.records) == 1 and "gone.json is not copied to MLflow" in caplog.text
    assert run_of(tracker, stage.run_id).data.metrics["loss"] == 1.0 and not stage.journal.exists()
