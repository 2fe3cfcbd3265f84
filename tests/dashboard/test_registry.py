"""Models in the registry: a version a round with its lineage, and a champion that is faster and passed the gate."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow.tracking import MlflowClient

from jf_cluster.config import Config
from jf_cluster.dashboard import show
from jf_cluster.dashboard.gathered import gather
from jf_cluster.dashboard.registry import champion_of, register, registered_name
from jf_cluster.evaluate.evaluation import save_evaluation
from jf_cluster.tracking import Tracker
from jf_cluster.tracking.store import SUPERSEDED_BY
from tests.dashboard.conftest import evaluation, export

BASE = evaluation(0, 1.1, 0.9)


@pytest.mark.parametrize(
    ("rounds", "champion"),
    [
        ([], None),
        ([(1.0, 0.9)], None),  # not faster than the base
        ([(2.0, 0.89)], 1),
        ([(2.0, 0.5)], None),  # faster, but failed the gate
        ([(2.0, 0.89), (3.0, 0.9)], 2),
        ([(2.0, 0.89), (3.0, 0.7)], 1),  # the second failed: the first stays
        ([(2.0, 0.89), (1.9, 0.95)], 1),  # the second is no faster
        ([(2.0, 0.7), (1.9, 0.9), (2.1, 0.9)], 3),
    ],
)
def test_only_a_faster_round_that_passed_becomes_champion(
    rounds: list[tuple[float, float]], champion: int | None
) -> None:
    evaluations = [evaluation(r, tpf, accuracy) for r, (tpf, accuracy) in enumerate(rounds, start=1)]
    assert champion_of([BASE, *evaluations]) == champion


def test_aliases_follow_the_rounds(tmp_path: Path) -> None:
    config = Config.model_validate({"name": "run", "runs_dir": tmp_path})
    tracker = Tracker.open(config)
    client, name = MlflowClient(tracker.uri, tracker.uri), registered_name(config)
    assert name == "jacobi-forcing-run"

    def aliases() -> dict[str, int]:
        return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}

    save_evaluation(config, BASE)
    for r, (tpf, accuracy) in enumerate([(2.0, 0.89), (3.0, 0.7), (3.0, 0.89)], start=1):
        with tracker.stage(r, "train"):
            export(config, r)
        save_evaluation(config, evaluation(r, tpf, accuracy))
        register(config, tracker, r)
        register(config, tracker, r)  # again: nothing new
        assert aliases() == {f"round-{i}": i for i in range(1, r + 1)} | {"champion": {1: 1, 2: 1, 3: 3}[r]}
    version = client.get_model_version_by_alias(name, "champion")
    assert version.run_id == tracker.stage_run(3, "train")
    assert version.tags["model_hash"] == "3" * 64 and version.tags["parent_model_hash"] == "p"
    assert version.tags["trajectories_content_hash"] == "t3" and version.description.startswith("\n# round-003")
    assert "| round 2 | 3.10 |" in client.get_registered_model(name).description
    source = client.get_model_version_download_uri(name, version.version)
    found = Path(mlflow.artifacts.download_artifacts(source))
    assert (found / "model.safetensors").read_bytes() == bytes([3])


def test_a_round_made_again_replaces_what_was_registered_and_shown(tmp_path: Path) -> None:
    config = Config.model_validate({"name": "run", "runs_dir": tmp_path})
    tracker = Tracker.open(config)
    client, name = MlflowClient(tracker.uri, tracker.uri), registered_name(config)

    def train(round_number: int, content: int, tpf: float) -> None:
        with tracker.stage(round_number, "train") as stage:
            stage.metrics({"train/tokens_per_s": 100.0 * content}, step=1)
            export(config, round_number, content)
        found = evaluation(round_number, tpf, 0.9).model_copy(update={"model_hash": f"{content}" * 64})
        save_evaluation(config, found)
        show(config, tracker)

    def figures() -> list[tuple[int, float]]:
        history = client.get_metric_history(tracker.run_id, "tpf_jacobi")
        return [(point.step, point.value) for point in sorted(history, key=lambda point: point.timestamp)]

    save_evaluation(config, BASE)
    train(1, content=1, tpf=2.0)
    train(2, content=2, tpf=3.0)
    first = client.get_model_version_by_alias(name, "round-2")
    shutil.rmtree(config.model_dir(2))
    train(2, content=5, tpf=4.0)
    second = client.get_model_version_by_alias(name, "round-2")
    assert second.version != first.version and second.run_id == tracker.stage_run(2, "train") != first.run_id
    assert second.tags["model_hash"] == "5" * 64 and second.tags["trajectories_content_hash"] == "t5"
    assert client.get_model_version_by_alias(name, "champion").version == second.version
    assert client.get_model_version(name, first.version).tags[SUPERSEDED_BY] == str(second.version)
    assert SUPERSEDED_BY not in client.get_model_version_by_alias(name, "round-1").tags
    assert figures() == [(0, 1.1), (1, 2.0), (2, 3.0), (2, 4.0)]
    rates = gather(config, tracker, 2).rates
    assert sorted((rate.round, rate.tokens_per_s) for rate in rates) == [(1, 100.0), (2, 500.0)]

    save_evaluation(config, evaluation(2, 4.0, 0.5).model_copy(update={"model_hash": "5" * 64}))
    show(config, tracker)
    again = client.get_model_version_by_alias(name, "round-2")
    assert again.version == second.version and again.tags["passed"] == "False", "the same model, judged otherwise"


def test_a_bucket_without_its_library_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Models are copied to a server's bucket by this process."""
    config = Config.model_validate({"name": "run", "runs_dir": tmp_path})
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(tracking).create_experiment("jacobi-forcing/run", artifact_location="s3://bucket/artifacts")
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setattr("jf_cluster.dashboard.registry.is_server", lambda uri: True)
    tracker = Tracker.open(config)
    with tracker.stage(1, "train"):
        export(config, 1)
    save_evaluation(config, BASE)
    save_evaluation(config, evaluation(1, 2.0, 0.9))
    register(config, tracker, 1)
    assert "models are not registered" in caplog.text and "boto3" in caplog.text


def test_a_registry_that_does_not_answer_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = Config.model_validate({"name": "run", "runs_dir": tmp_path})
    tracker = Tracker.open(config)
    save_evaluation(config, BASE)
    save_evaluation(config, evaluation(1, 2.0, 0.9))
    export(config, 1)
    reachable, tracker.uri = tracker.uri, "http://127.0.0.1:9"
    register(config, tracker, 1)
    assert "models are not registered" in caplog.text
    tracker.uri = reachable
    register(config, tracker, 1)
    name = registered_name(config)
    assert set(MlflowClient(reachable, reachable).get_registered_model(name).aliases) == {"round-1", "champion"}
