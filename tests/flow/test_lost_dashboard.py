"""MLflow's server is killed while a round is collected: the round goes on, and nothing that was recorded is lost."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jf_cluster.tracking import Tracker, stage_run
from tests.flow.conftest import collected, small_config
from tests.flow.faulty import KillsTheDashboard

pytestmark = pytest.mark.usefixtures("local_ray")


class Server:
    """A real server on a port of its own, whose records outlive it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        with (self._directory / "server.log").open("ab") as said:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)),
                    *("--backend-store-uri", f"sqlite:///{self._directory / 'server.db'}", "--workers", "1"),
                    *("--artifacts-destination", str(self._directory / "artifacts")),
                ],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
                stdout=said,
                stderr=said,
            )
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self._directory / "server.log").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_killed_mlflow_server_costs_a_warning(
    server: Server,
    reference,
    tmp_path: Path,
    base_model: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(stage_run, "SEND_EVERY_S", 0.0)
    config = small_config(tmp_path / "runs", base_model, tracking={"uri": server.address})
    config.runs_dir.mkdir()
    (config.runs_dir / "server").write_text(str(server.process.pid))
    with caplog.at_level(logging.WARNING):
        manifest = collected(config, worker_class=KillsTheDashboard)
    assert server.process.wait(timeout=10) == -signal.SIGKILL
    assert manifest.content_hash == reference[1].content_hash
    lost = [record for record in caplog.records if "does not answer" in record.message]
    assert len(lost) == 1 and "metrics are kept in" in lost[0].message

    server.start()
    with Tracker.open(config) as tracker:  # what the next command does first
        run_id = tracker.stage_run(1, "collect")
        assert run_id is not None
        run = MlflowClient(server.address).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["rows"] == 20
    assert run.data.tags["store_hash"] == manifest.content_hash and run.data.params["block_size"] == "8"
    history = MlflowClient(server.address).get_metric_history(run_id, "prompts_done")
    assert max(point.value for point in history) == 20
    assert not list((config.run_dir / "tracking").glob("*.jsonl")), "nothing is kept any more"
