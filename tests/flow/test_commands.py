"""The commands people type: help, wrong input, the cluster and its job server, the dashboard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jf_cluster import cluster
from tests.flow.conftest import ROOT, run, small_config

JOBS = ("collect", "train", "evaluate", "distill")


def test_make_help_names_every_target() -> None:
    shown = run("make", "help").stdout
    for target in ("train", "collect", "evaluate", "mlflow", "cluster", "cluster-stop", "test", "check", "bench"):
        assert f"make {target} " in shown
    assert run("make").stdout == shown


@pytest.mark.parametrize("job", JOBS)
def test_jobs_explain_themselves(job: str) -> None:
    done = run(str(ROOT / "jobs" / f"{job}.py"), "--help")
    assert done.returncode == 0
    for word in ("--config", "--round", "overrides", "train.learning_rate=1e-5"):
        assert word in done.stdout


def test_python_m_jf_cluster_explains_itself() -> None:
    shown = run(sys.executable, "-m", "jf_cluster", "--help").stdout
    assert all(name in shown for name in ("cluster", "config", "report", "mlflow"))
    assert "learning_rate:" in run(sys.executable, "-m", "jf_cluster", "config").stdout


def _wrong(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    return {
        "unknown key": (["train.learning_rat=1"], "train.learning_rat: unknown key"),
        "no file": (["--config", "configs/nothing.yaml"], "no configuration file configs/nothing.yaml"),
        "no weights": ([f"model.path={tmp_path / 'bare'}"], "has no weights"),
        "no model": ([f"model.path={tmp_path / 'nowhere'}"], "does not exist"),
        "empty data": ([f"prompts.source={tmp_path / 'empty.jsonl'}", "prompts.answer_column=text"], "has no rows"),
        "no column": ([f"prompts.source={tmp_path / 'other.jsonl'}", "prompts.grader=none"], "no column 'question'"),
    }


@pytest.mark.parametrize("case", ["unknown key", "no file", "no weights", "no model", "empty data", "no column"])
def test_wrong_input_is_one_clear_message(tmp_path: Path, case: str) -> None:
    arguments, message = _wrong(tmp_path)[case]
    runs = tmp_path / "runs"
    done = run(sys.executable, "jobs/collect.py", *arguments, f"runs_dir={runs}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not runs.exists(), "nothing half-written"


def test_a_store_that_cannot_be_reached_is_one_clear_message(tmp_path: Path) -> None:
    url = "s3://nowhere/store?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    runs, keys = (
        tmp_path / "runs",
        {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "1"},
    )
    done = run(sys.executable, "jobs/collect.py", f"store={url}", f"runs_dir={runs}", **keys)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: store: cannot write nowhere/store/"), done.stderr
    assert not runs.exists(), "nothing half-written"


def test_a_job_runs_as_typed(tmp_path: Path, base_model: Path) -> None:
    """`ray job submit jobs/collect.py` in a shell that knows nothing but the programs of the environment."""
    if cluster._listening(8265):
        pytest.skip("another Ray head has the dashboard's port")
    config = small_config(tmp_path / "runs", base_model)
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    runs_dir = str(tmp_path / "runs")
    started = run(sys.executable, "-m", "jf_cluster", "cluster", "start", "--runs-dir", runs_dir)
    try:
        assert started.returncode == 0, started.stderr
        again = run(sys.executable, "-m", "jf_cluster", "cluster", "start", "--runs-dir", runs_dir)
        assert again.stdout == started.stdout, "a running head is left alone"
        job = ["ray", "job", "submit", "--", "jobs/collect.py", "--config", str(tmp_path / "small.yaml")]
        # What importing jf_cluster sets in .venv (see the Makefile) is set here by hand: this Python may not have it.
        from jf_cluster.ray_environment import DEFAULTS

        done = run(*job, RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265", **DEFAULTS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "round 1 collected" in done.stdout and "joining the Ray cluster" in done.stdout
        assert (tmp_path / "runs" / "small" / "store" / "round-001" / "manifest.json").is_file()
        due = run(*job, RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265", **DEFAULTS)
        assert "waits to be trained; next: ray job submit jobs/train.py" in due.stdout
    finally:
        stopped = run(sys.executable, "-m", "jf_cluster", "cluster", "stop", "--runs-dir", runs_dir)
    assert "stopped" in stopped.stdout and not cluster._listening(8265)
    assert "no Ray head" in run(sys.executable, "-m", "jf_cluster", "cluster", "stop", "--runs-dir", runs_dir).stdout
