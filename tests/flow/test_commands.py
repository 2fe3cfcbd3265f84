"""The commands people type: help, wrong input, the cluster and its job server, the dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jf_cluster import cluster
from jf_cluster.models import load_tokenizer, model_hash, tokenizer_hash
from tests.clone import fresh_shell, make_clone
from tests.flow.conftest import ROOT, run, small_config
from trajectory_store import TrajectoryStore

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


def test_an_imported_round_is_of_the_model_whose_hash_is_printed(tmp_path: Path, base_model: Path) -> None:
    hashes = run(sys.executable, "-m", "jf_cluster", "hash", str(base_model)).stdout.split()
    source, path = tmp_path / "mine.jsonl", tmp_path / "store" / "round-001"
    row = {"prompt_id": "a", "prompt": [1], "response": [3, 4], "finished": True}
    source.write_text(json.dumps(row | {"iterations": [1], "accepted": [1], "tails": [9]}))
    store = (sys.executable, "-m", "trajectory_store")
    done = run(*store, "import", str(source), str(path), "--block-size", "8", *hashes)
    assert done.returncode == 0, done.stderr
    made_by = TrajectoryStore(tmp_path / "store").round(1).manifest.provenance
    config = small_config(tmp_path, base_model)
    assert made_by.model_hash == model_hash(config.model_dir(0))
    assert made_by.tokenizer_hash == tokenizer_hash(load_tokenizer(config))


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


@pytest.mark.parametrize("job", ["collect", "train"])
def test_round_zero_is_refused(tmp_path: Path, job: str) -> None:
    done = run(sys.executable, f"jobs/{job}.py", "--round", "0", f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 2 and "Invalid value for '--round'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_job_runs_as_typed(tmp_path: Path, base_model: Path) -> None:
    """`ray job submit` in a fresh shell at the root of a clone, with `.venv` activated and nothing exported."""
    clone = make_clone(tmp_path / "clone")
    # Smaller than what is shipped, and on another port, so that others may use 8265; what is typed stays the same.
    shutil.copytree(base_model, clone / "base")
    questions = [json.dumps({"question": f"How many is {i} and {i + 1}?"}) for i in range(400)]
    (clone / "questions.jsonl").write_text("\n".join(questions))
    prompts = {"source": "questions.jsonl", "per_round": 20, "held_out": 12, "grader": "none"}
    settings = small_config(Path("runs"), Path("base"), name="tiny", prompts=prompts)
    (clone / "configs" / "tiny.yaml").write_text(settings.to_yaml())
    environment = clone / "jf_cluster" / "ray_environment.py"
    [port] = cluster._free_ports(1)
    environment.write_text(environment.read_text().replace("DASHBOARD_PORT = 8265", f"DASHBOARD_PORT = {port}"))

    def typed(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=clone, env=fresh_shell(clone), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    started = typed("make cluster")
    try:
        assert f"http://127.0.0.1:{port}" in started and typed("make cluster") == started, "it is left alone"
        collected = typed("ray job submit jobs/collect.py")
        assert "round 1 collected" in collected and "joining the Ray cluster" in collected
        assert collected.rstrip().count("next: ray job submit jobs/train.py") == 1
        assert (clone / "runs" / "tiny" / "store" / "round-001" / "manifest.json").is_file()

        in_a_copy = typed("ray job submit --working-dir . -- python jobs/collect.py name=copied")
        assert "round 1 collected" in in_a_copy
        assert "next: ray job submit --working-dir . -- python jobs/train.py name=copied" in in_a_copy
        assert (clone / "runs" / "copied" / "store" / "round-001" / "manifest.json").is_file()
        kept = [(clone / "runs" / name / "config.yaml").read_text() for name in ("tiny", "copied")]
        assert kept[0].replace("name: tiny", "name: copied") == kept[1], "no path into the copy: the next has another"
        assert f"source: {clone / 'questions.jsonl'}" in kept[0]
    finally:
        stopped = typed("make cluster-stop")
    assert "stopped" in stopped and not cluster._listening(port)
    assert "no Ray head" in typed("make cluster-stop")
