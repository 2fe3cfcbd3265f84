"""Serving MLflow on this machine, and the address at which people begin to look."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.error import URLError

import typer

from jf_cluster.config import Config
from jf_cluster.dashboard.gathered import overview_path
from jf_cluster.tracking.store import KEY, STAGE, client, experiment_name, run_key, tracking_uri
from jf_cluster.tracking.tracker import PARENT

UP_WITHIN_S = 120.0


def landing_page(config: Config, server: str) -> str:
    """Address of the run's overview in the dashboard at ``server``; the list of experiments before there is a run."""
    mlflow = client(tracking_uri(config))
    experiment = mlflow.get_experiment_by_name(experiment_name(config))
    if experiment is None or not config.run_dir.is_dir():
        return f"{server}/#/experiments"
    wanted = f"tags.`{KEY}` = '{run_key(config.run_dir)}' and tags.`{STAGE}` = '{PARENT}'"
    found = mlflow.search_runs([experiment.experiment_id], wanted, max_results=1)
    page = f"{server}/#/experiments/{experiment.experiment_id}/runs"
    if found:
        page += f"/{found[0].info.run_id}"
        if overview_path(config).is_file():
            page += f"/artifacts/{overview_path(config).name}"
    return f"{page}?workflowType=machine_learning"  # MLflow's other layout is about chats


def serve(config: Config, port: int, browser: bool) -> int:
    """Run the dashboard until it is interrupted; give its exit code."""
    server = f"http://127.0.0.1:{port}"
    config.runs_dir.mkdir(parents=True, exist_ok=True)
    page = landing_page(config, server)
    typer.echo(f"MLflow dashboard: {server} (takes about 20 s to come up; Ctrl-C stops it)")
    typer.echo(f"what every round did: {page}")
    sys.stdout.flush()
    if browser:
        threading.Thread(target=_open_when_up, args=(server, page), daemon=True).start()
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--artifacts-destination", (config.runs_dir / "mlartifacts").as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    os.environ["MLFLOW_BACKEND_STORE_URI"] = tracking_uri(config)  # everybody can read a command line
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Ten workers for jobs nobody starts here; they outlive a server that is killed.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    return subprocess.run(command, check=False).returncode


def has_display() -> bool:
    """Whether a browser window could be seen: elsewhere Python would start a browser inside the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _open_when_up(server: str, page: str) -> None:
    deadline = time.monotonic() + UP_WITHIN_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server}/health", timeout=2):
                typer.launch(page)
                return
        except (URLError, OSError):
            time.sleep(1)
