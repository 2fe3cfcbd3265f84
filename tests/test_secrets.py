"""What gives access to a store or a server is used, and neither recorded nor shown anywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.collect import collect_round
from jf_cluster.collect.collecting import Undertaking
from jf_cluster.config import Config, load_config
from jf_cluster.dashboard import serving
from jf_cluster.rounds import _record, opened
from jf_cluster.status import StatusReader
from jf_cluster.tracking import Tracker
from jf_cluster.train import driver
from trajectory_store import StoreUnavailableError, Trajectory, TrajectoryStore

SECRET = "hush-hush"
SERVER = f"http://user:{SECRET}@127.0.0.1:9"
"""Nothing answers there."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store on a real S3-compatible server, with its key in its URL as pyarrow takes it."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    filesystem, bucket = pafs.FileSystem.from_uri(f"s3://key:{SECRET}@secrets?{query}")
    filesystem.create_dir(bucket)
    yield f"s3://key:{SECRET}@secrets/store?{query}"
    server.stop()


def config_of(runs_dir: Path, store: str | None = None, uri: str | None = SERVER) -> Config:
    return Config.model_validate(
        {
            "name": "run", "runs_dir": runs_dir, "store": store, "prompts": {"per_round": 2}, "tracking": {"uri": uri},
            "collect": {"block_size": [8]},
        }
    )  # fmt: skip


def holders(directory: Path) -> list[str]:
    """Files that hold the secret."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_records_none(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level(logging.DEBUG, "jf_cluster")
    lost = StoreUnavailableError(f"cannot open {store}")
    with (
        pytest.raises(StoreUnavailableError),
        opened(config_of(tmp_path, store)) as run,
        run.tracker.stage(1, "collect"),
    ):
        raise lost
    assert (tmp_path / "run" / "tracking" / "distill.jsonl").is_file(), "what MLflow is to be told is kept"
    assert "cannot open s3://secrets/store" in (tmp_path / "run" / "log.txt").read_text()
    assert "MLflow at http://127.0.0.1:9 cannot be used" in caplog.text and SECRET not in caplog.text
    assert holders(tmp_path) == []

    config = config_of(tmp_path, store, uri=None)  # the same command goes on, with its key and another server
    with opened(config) as rounds:
        undertaking = Undertaking.of(config, 1)
        none = np.zeros(0, np.int32)
        with undertaking.folder.writer(undertaking.provenance) as writer:
            for prompt_id in undertaking.prompts.ids().to_pylist():
                writer.append(Trajectory(prompt_id, np.ones(1, np.int32), none, True, none, none, none))
        assert collect_round(config, 1, rounds.tracker).rows == 2
        (told,) = (run for run in _runs(rounds.tracker) if run.data.tags.get("jf_cluster.stage") == "collect")
        assert told.data.tags["store"].startswith("s3://secrets/store?scheme=http")
        (parent,) = (run for run in _runs(rounds.tracker) if run.data.tags.get("jf_cluster.stage") == "distill")
        assert parent.data.params["tracking.uri"] == "http://127.0.0.1:9"
        assert parent.data.params["store"].startswith("s3://secrets/store")
    assert StatusReader(config).read().rounds[1].trajectories.startswith("2 ")
    driver._write_lineage(config, 1, "made", "parent", "trajectories", tmp_path / "run")
    assert holders(tmp_path) == []
    folder = TrajectoryStore(store).round(1).folder
    assert [name for name in folder.entries() if SECRET.encode() in bytes(folder.read(name))] == []
    assert "s3://secrets" in bytes(folder.read("provenance.json")).decode()


def _runs(tracker: Tracker) -> list:
    return list(MlflowClient(tracker.uri).search_runs([tracker.experiment_id]))


def test_a_record_with_secrets_is_gone_on_with_and_replaced(tmp_path: Path) -> None:
    """As older versions left them."""
    config = config_of(tmp_path, f"s3://key:{SECRET}@secrets/store")
    config = config.model_copy(
        update={"prompts": config.prompts.model_copy(update={"source": f"https://a:{SECRET}@b/q.json"})}
    )
    path = config.run_dir / "config.yaml"
    config.run_dir.mkdir()
    path.write_text(config.to_yaml().replace("://", f"://a:{SECRET}@"))
    assert path.read_text().count(SECRET) == 3
    _record(config)
    assert holders(tmp_path) == []
    assert load_config(path).store == "s3://secrets/store"


def test_commands_show_none(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = str(Path(__file__).parent.parent / "configs" / "tiny.yaml")
    given = ["--config", tiny, f"runs_dir={tmp_path / 'runs'}", f"store={store}", f"tracking.uri={SERVER}"]

    def shown(*command: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [command[0], *given, *command[1:]])
        assert done.exit_code == code, done.output
        assert SECRET not in done.output and SECRET not in str(done.exception)
        return done.output

    assert "store: s3://secrets/store?" in shown("config") and "uri: http://127.0.0.1:9" in shown("config")
    planned = shown("plan", "--no-calibration")
    assert "MLflow at http://127.0.0.1:9 does not answer" in planned
    assert "cannot open the store at s3://secrets" in shown("plan", "--no-calibration", f"{given[3]}&bogus=1", code=1)
    # The value is wrong and repeated.
    assert "train.steps" in shown("config", f"train.steps=s3://key:{SECRET}@b", code=2)
    monkeypatch.setattr(serving, "landing_page", lambda _, server: f"{server}/page")
    assert "server at http://127.0.0.1:9: http://127.0.0.1:9/page" in shown("mlflow")


def test_the_dashboards_command_line_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on the machine can read it."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        started.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(serving.subprocess, "run", run)
    monkeypatch.setattr(serving, "landing_page", lambda _, server: server)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "put back afterwards")
    uri = f"postgresql://user:{SECRET}@db/mlflow"
    assert serving.serve(config_of(tmp_path, uri=uri), 5000, browser=False) == 0
    assert started and SECRET not in " ".join(started[0])
    assert serving.os.environ["MLFLOW_BACKEND_STORE_URI"] == uri
