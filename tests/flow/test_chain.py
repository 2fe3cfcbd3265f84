"""The whole chain on a small size: real Ray, DeepSpeed and MLflow, once left alone and once killed at every stage."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from mlflow.tracking import MlflowClient

from jf_cluster.config import Config
from jf_cluster.evaluate import load_evaluation
from jf_cluster.evaluate.evaluation import evaluation_path
from jf_cluster.models import model_hash
from jf_cluster.planning.calibration import measured
from jf_cluster.planning.estimate import stages
from jf_cluster.tracking import tracking_uri
from jf_cluster.tracking.activity import read_activity
from tests.flow.conftest import chain_command, chain_config, run, stopped_when
from trajectory_store import TrajectoryStore


def test_two_rounds(undisturbed: tuple[Config, str]) -> None:
    config, shown = undisturbed
    _check_report(config, shown)
    _check_lineage(config)
    _check_mlflow(config)
    _check_estimate(config)
    log = (config.run_dir / "log.txt").read_text()
    assert "training round 1 from model 0: 20 trajectories" in log
    assert "training round 2 from model 1: 40 trajectories" in log, "those of the first round again"

    again = run(*chain_command(config))
    assert again.returncode == 0 and "starting a local Ray" not in again.stderr, "nothing was missing"
    assert again.stdout == shown, "the same table"


@dataclass(frozen=True)
class Moment:
    """When the driver is killed: as soon as it ``has`` come so far, and before it ``is_over``."""

    name: str
    has: Callable[[Config], bool]
    is_over: Callable[[Config], bool]


MOMENTS = (
    Moment("collecting", lambda c: _shards(c) > 0, lambda c: _is_sealed(c)),
    Moment("training", lambda c: _checkpoint(c, 2).exists(), lambda c: Path(c.model_dir(1)).exists()),
    Moment("exporting", lambda c: _partial(c).exists(), lambda c: Path(c.model_dir(1)).exists()),
    Moment("publishing", lambda c: Path(c.model_dir(1)).exists(), lambda c: evaluation_path(c, 1).exists()),
    Moment("evaluating", lambda c: _evaluates(c), lambda c: evaluation_path(c, 1).exists()),
)


@pytest.mark.usefixtures("local_ray")
def test_killed_at_every_stage_the_same_command_ends_as_if_it_had_not_been(
    undisturbed: tuple[Config, str], tmp_path: Path, base_model: Path
) -> None:
    """One run of one round. The drivers join one Ray, which so has to clean up after each of them."""
    config = chain_config(tmp_path / "runs", base_model, rounds=1, collect__workers=1)
    command = chain_command(config)
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for moment in MOMENTS:
        _kill(command, config, moment, address)
        if moment.name == "publishing":
            published = _stamps(Path(config.model_dir(1)))
    done = run(*command, timeout_s=600, **address)
    assert done.returncode == 0, done.stderr
    assert published == _stamps(Path(config.model_dir(1))), "not made again"
    _check_same(config, undisturbed[0])
    _check_nothing_is_left(config)

    client = MlflowClient(tracking_uri(config))
    experiment = client.get_experiment_by_name("jacobi-forcing/small")
    runs = {r.info.run_name: r.info.status for r in client.search_runs([experiment.experiment_id])}
    stages = ["round-000-evaluate", "round-001-collect", "round-001-train", "round-001-evaluate", "round-002-collect"]
    assert runs.keys() == {*stages, "small"}, "a stage that goes on keeps its run"
    # Killed when the model had just appeared: nothing was left to do in that stage.
    assert runs == dict.fromkeys(runs, "FINISHED") | {"round-001-train": "KILLED"}


def _kill(command: list[str], config: Config, moment: Moment, variables: dict[str, str]) -> None:
    """Start the driver and kill it, without warning, at a moment of its life."""
    said = config.runs_dir.with_name("said")
    stopped_when(lambda: moment.has(config), signal.SIGKILL, command, said, **variables)
    assert not moment.is_over(config), f"killed too late for {moment.name}"


def _evaluates(config: Config) -> bool:
    stages = read_activity(config.run_dir)
    return any((now.round, now.stage) == (1, "evaluate") and now.done > 0 for now in stages)


def _shards(config: Config) -> int:
    return len(list((Path(config.store_url) / "round-001").glob("shard-*")))


def _is_sealed(config: Config) -> bool:
    return TrajectoryStore(config.store_url).round(1).is_sealed


def _checkpoint(config: Config, step: int) -> Path:
    return config.run_dir / "checkpoints" / "round-001" / f"step-{step:06d}" / "complete.json"


def _partial(config: Config) -> Path:
    return config.run_dir / "models" / ".round-001.partial"


def _check_same(config: Config, other: Config) -> None:
    """Trajectories, weights and figures are those of the other run, for as many rounds as this one has."""
    for round_number in (1, 2):
        mine, others = (TrajectoryStore(c.store_url).round(round_number) for c in (config, other))
        assert mine.manifest.content_hash == others.manifest.content_hash
        assert mine.committed_ids() == others.committed_ids() and mine.manifest.rows == 20
    assert model_hash(config.model_dir(1)) == model_hash(other.model_dir(1))
    mine_rows, other_rows = (json.loads((c.run_dir / "report.json").read_text())["rounds"] for c in (config, other))
    assert [_untimed(row) for row in mine_rows] == [_untimed(row) for row in other_rows[:2]]


def _untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("seconds_", "tps_"))}


def _check_nothing_is_left(config: Config) -> None:
    """Of what was under way when it was killed, on the disk and in Ray."""
    names = {path.relative_to(config.run_dir).as_posix() for path in config.run_dir.rglob("*")}
    assert not {name for name in names if ".tmp" in name or "partial" in name or name.startswith("checkpoints/")}
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a killed driver's actors live on"
        time.sleep(0.2)


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
    assert children == {f"round-{r:03d}-{stage}": "FINISHED" for r, stage in stages}
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
        assert train["model_hash"] == made
