"""The whole chain for two rounds on a cut-down size: real Ray, DeepSpeed and MLflow, killed once on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jf_cluster.evaluate import load_evaluation
from jf_cluster.models import model_hash
from jf_cluster.planning.calibration import measured
from jf_cluster.planning.estimate import stages
from jf_cluster.tracking import tracking_uri
from tests.flow.conftest import small_config
from tests.flow.test_commands import ROOT, run
from trajectory_store import TrajectoryStore


@pytest.mark.timeout(900)
def test_two_rounds(tmp_path: Path, base_model: Path) -> None:
    config = small_config(
        tmp_path / "runs",
        base_model,
        rounds=2,
        train={
            "workers": 2,
            "steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "micro_batch_tokens": 512,
            "micro_batches_per_step": 2,
            "checkpoint_every_steps": 2,
        },
    )
    settings = tmp_path / "small.yaml"
    settings.write_text(config.to_yaml())
    command = [sys.executable, "jobs/distill.py", "--config", str(settings)]

    _kill_when(command, Path(config.model_dir(1)))
    made = _stamps(Path(config.model_dir(1)))

    done = run(*command, timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert made == _stamps(Path(config.model_dir(1))), "not made again"
    _check_report(config, done.stdout)
    _check_lineage(config)
    _check_mlflow(config)
    _check_estimate(config)

    again = run(*command)
    assert again.returncode == 0 and "starting a local Ray" not in again.stderr, "nothing was missing"
    assert again.stdout == done.stdout, "the same table"


def _kill_when(command: list[str], appears: Path) -> None:
    """Start a command and kill it with all it started, without warning, when a path appears."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not appears.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _stamps(model: Path) -> dict[Path, int]:
    """When each of a model's files was written, but for the card, which gets its table after the evaluation."""
    return {path: path.stat().st_mtime_ns for path in model.rglob("*") if path.name != "README.md"}


def _check_report(config, shown: str) -> None:
    rows = json.loads((config.run_dir / "report.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(value is not None for row in rows for value in row.values())
    assert rows[0]["seconds_train"] == 0 < rows[1]["seconds_train"]
    assert rows[0]["agreement_with_base"] == 1.0
    assert all(row["samples"] == 20 and row["block_size"] == 8 and row["iterations_per_block"] >= 1 for row in rows)
    assert "Rounds (0 is the base model)" in shown


def _check_lineage(config) -> None:
    """Every round was made by the model before it."""
    for round_number in (1, 2, 3):
        manifest = TrajectoryStore(config.store_url).round(round_number).manifest
        assert manifest.provenance.model_hash == model_hash(config.model_dir(round_number - 1))
    assert len({model_hash(config.model_dir(r)) for r in (0, 1, 2)}) == 3


def _check_estimate(config) -> None:
    """The rates taken from a run give the times of that run."""
    collect, train, evaluate = stages(config, measured(config).rates)
    rows = json.loads((config.run_dir / "report.json").read_text())["rounds"]
    assert collect.seconds == pytest.approx(rows[0]["seconds_collect"])
    assert evaluate.seconds == pytest.approx(load_evaluation(config, 0).seconds)
    training = json.loads((config.run_dir / "training" / "round-001.json").read_text())
    # The first steps are the slowest and are left out of the median.
    assert 0 < train.seconds - (training["seconds"] - training["step_seconds"]) <= training["step_seconds"] * 1.5
    assert (collect.count, train.count, evaluate.count) == (3, 2, 3), "the stages that were recorded"


def _check_mlflow(config) -> None:
    """One parent run, a finished nested run for every stage, and the table's figures on the parent."""
    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("jacobi-forcing/small")
    runs = client.search_runs([experiment.experiment_id])
    children = {r.info.run_name: r.info.status for r in runs if "mlflow.parentRunId" in r.data.tags}
    stages = [(r, "collect") for r in (1, 2, 3)] + [(r, "train") for r in (1, 2)] + [(r, "evaluate") for r in (0, 1, 2)]
    # Killed when model 1 had just appeared: its training run is the only one that did not end by itself.
    assert children.keys() == {f"round-{r:03d}-{stage}" for r, stage in stages}
    assert {name for name, status in children.items() if status != "FINISHED"} <= {"round-001-train"}
    assert "RUNNING" not in children.values()
    by_name = {r.info.run_name: r for r in runs}
    _check_chain_of_hashes({name: run.data.tags for name, run in by_name.items()})
    collect, train = by_name["round-002-collect"].data.metrics, by_name["round-002-train"].data.metrics
    assert {"prompts_done", "rejects", "retries", "workers_replaced", "accepted_tokens_per_iteration"} <= collect.keys()
    assert {"train/loss", "train/consistency", "train/ar", "train/learning_rate", "train/restarts"} <= train.keys()
    assert all("system/cpu_utilization_percentage" in metrics for metrics in (collect, train))
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [m.step for m in client.get_metric_history(parent.info.run_id, "tpf_jacobi")] == [0, 1, 2]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"overview.html", "report.json", "config.yaml"}
    page = (config.run_dir / "overview.html").read_text()
    for picture in ("speed-and-accuracy", "trajectories", "iterations", "decoding-multiblock", "settings"):
        assert f'<section id="{picture}">' in page
    assert {"round-1", "round-2"} <= client.get_registered_model("jacobi-forcing-small").aliases.keys()


def _check_chain_of_hashes(tags: dict[str, dict[str, str]]) -> None:
    """Model, trajectories, model, …: each stage's run names what it came from and what it made."""
    for r in (1, 2):
        collect, train = tags[f"round-{r:03d}-collect"], tags[f"round-{r:03d}-train"]
        assert train["parent_model_hash"] == collect["model_hash"] and train["store_hash"] == collect["store_hash"]
        made = tags[f"round-{r + 1:03d}-collect"]["model_hash"]
        assert tags[f"round-{r:03d}-evaluate"]["model_hash"] == made != collect["model_hash"]
        assert train.get("model_hash", made) == made  # round 1's training run was killed when the model appeared
