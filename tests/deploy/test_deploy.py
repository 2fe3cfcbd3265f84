"""The files in deploy/: KubeRay's and the cluster launcher's against their schemas, Slurm's script run for real.

Slurm itself is replaced by two commands that do on this machine what it does on nodes, so the script brings up two
raylets with scratch directories of their own and distils over both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import ray
import yaml

from jf_cluster.config import Config, load_config
from tests.flow.conftest import small_config

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"

# What KubeRay 1.6 knows of what is used: a name not in here is misspelt, and its pods are Kubernetes' own.
RAY_JOB = {
    "apiVersion", "kind", "metadata", "spec", "spec.entrypoint", "spec.submissionMode", "spec.backoffLimit",
    "spec.shutdownAfterJobFinishes", "spec.ttlSecondsAfterFinished", "spec.rayClusterSpec",
}  # fmt: skip
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_the_ray_job_is_what_kuberay_and_kubernetes_take() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert {*job, *(f"spec.{key}" for key in job["spec"])} <= RAY_JOB
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert set(cluster) <= RAY_CLUSTER and set(groups[0]) <= HEAD and all(set(g) <= WORKERS for g in groups[1:])
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
    assert cluster["rayVersion"] == ray.__version__, "the submitter and the cluster must speak the same Ray"
    assert f"rayproject/ray:{ray.__version__}" in (DEPLOY / "Dockerfile").read_text()
    # Applying the file of a job that has ended changes nothing.
    again = "kubectl replace --force -f deploy/kuberay-rayjob.yaml"
    assert again in (DEPLOY / "kuberay-rayjob.yaml").read_text() and again in (ROOT / "docs" / "deploy.md").read_text()
    _check_gpus(job["spec"]["entrypoint"], sum(_gpus(group) for group in groups[1:]))


def _gpus(group: dict[str, Any]) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits["nvidia.com/gpu"]) * group["replicas"]


def _check_gpus(command: str, gpus: int) -> None:
    """The configuration a deployment names exists and uses every GPU it brings up."""
    found = re.search(r"configs/[\w.-]+\.yaml", command)
    assert found is not None
    config = load_config(ROOT / found[0])
    assert config.train.workers * config.train.gpus_per_worker == gpus
    assert config.collect.workers * config.collect.gpus_per_worker == gpus


def test_the_image_takes_nothing_that_git_ignores() -> None:
    """An environment, a history or runs would make it gigabytes larger and publish them."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    assert (ROOT / ".dockerignore").read_text().split() == [".git", *(f"**/{name}" for name in ignored)]


def test_the_cluster_launchers_file_fits_rays_schema() -> None:
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"head_node_typ": "head"}, schema)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    # Ray's name for "the latest" image stands for Ubuntu 18.04, which has no Python that make accepts.
    assert all(t["node_config"]["ImageId"] == "ami-00000000000000000" for t in types.values())
    assert any("make .venv/ready PYTHON=python3.11" in command for command in cluster["setup_commands"])
    _check_gpus(text, sum(t["resources"].get("GPU", 0) * t.get("min_workers", 0) for t in types.values()))


SRUN = """#!/usr/bin/env bash
# Runs a step here: its options are Slurm's, its node has a scratch directory of its own. Since 22.05 the cores of a
# job's task are not those of a step.
[[ ${SRUN_CPUS_PER_TASK:-} == "$SLURM_CPUS_PER_TASK" ]] || { echo "a step of one core" >&2; exit 1; }
node=other
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done
if [[ $1 == hostname ]]; then echo 127.0.0.1; exit; fi
export RAY_TMPDIR=$SCRATCH/$node
mkdir -p "$RAY_TMPDIR"
echo "$node: $*" >> "$SCRATCH/steps"
if [[ $* == "ray start --head"* ]] && rm "$SCRATCH/late" 2> /dev/null; then exit 1; fi
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' first second; else echo "$*" >> "$SCRATCH/control"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job of two nodes with one core each."""
    root = tmp_path / "clone"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "activate").touch()
    (root / "jobs").symlink_to(ROOT / "jobs")
    scratch = Path(tempfile.mkdtemp(prefix="jf"))  # short: sockets lie in it
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k.startswith("RAY_gcs_")}
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), clean["PATH"]])
    yield clean | {
        "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(scratch), "SCRATCH": str(scratch),
        "SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "[first,second]",
        "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def config(tmp_path: Path, base_model: Path) -> Config:
    """One round, its file at ``small.yaml``."""
    config = small_config(tmp_path / "shared", base_model, rounds=1)
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    return config


def _submit(environment: dict[str, str], said: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with said.open("wb") as output:
        return subprocess.Popen(
            [DEPLOY / "slurm.sh", *arguments], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _wait_until_it_evaluates(job: subprocess.Popen[bytes], said: Path) -> None:
    while "evaluating model 0" not in said.read_text():
        assert job.poll() is None, said.read_text()
        time.sleep(0.2)


def _end(job: subprocess.Popen[bytes]) -> None:
    """What Slurm does when a job is over: nothing of it lives on."""
    try:
        os.killpg(job.pid, signal.SIGTERM)
        time.sleep(1)
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.mark.slow
def test_slurms_script_distils_over_two_nodes(slurm: dict[str, str], config: Config, tmp_path: Path) -> None:
    # Two collectors and two ranks need a core each, and no node has two.
    said = tmp_path / "said"
    job = _submit(slurm, said, str(tmp_path / "small.yaml"), "collect.workers=2", "train.workers=2", "train.steps=2")
    try:
        assert job.wait(timeout=1200) == 0, said.read_text()
    finally:
        _end(job)
    steps = Path(slurm["SCRATCH"], "steps").read_text()
    assert re.search(r"^first: ray start --head .*--num-cpus=1", steps, re.MULTILINE)
    assert re.search(r"^other: ray start --address=127\.0\.0\.1:\d+", steps, re.MULTILINE)
    assert [r["round"] for r in json.loads((config.run_dir / "report.json").read_text())["rounds"]] == [0, 1]


def test_slurms_script_stops_before_its_time_is_over_and_is_queued_again(
    slurm: dict[str, str], config: Config, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    Path(slurm["SCRATCH"], "late").touch()  # Ray's head does not start in its time at first
    job = _submit(slurm, said, str(tmp_path / "small.yaml"), "collect.workers=2")
    try:
        _wait_until_it_evaluates(job, said)
        assert Path(slurm["SCRATCH"], "steps").read_text().count("ray start --head") == 2
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(timeout=300) == 143, said.read_text()
    finally:
        _end(job)
    assert Path(slurm["SCRATCH"], "control").read_text().split() == ["requeue", str(os.getpid())]


def test_slurms_script_ends_when_rays_head_does(slurm: dict[str, str], config: Config, tmp_path: Path) -> None:
    said = tmp_path / "said"
    job = _submit(slurm, said, str(tmp_path / "small.yaml"), "collect.workers=2")
    try:
        _wait_until_it_evaluates(job, said)
        children = psutil.Process(job.pid).children()
        [head] = [child for child in children if {"start", "--head"} <= set(child.cmdline())]
        head.kill()
        assert job.wait(timeout=300) == 1, said.read_text()
    finally:
        _end(job)
    assert "error: Ray's head on first ended; submitted again, the job carries on" in said.read_text()
    assert not Path(slurm["SCRATCH"], "control").exists(), "it is for a person to look at"
