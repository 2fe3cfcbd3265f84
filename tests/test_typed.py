"""What to type next says the configuration, round and overrides in use, so that typing it continues the same run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from jf_cluster.typed import Typed

ROOT = Path(__file__).parent.parent
MINE = Path("my configs/mine.yaml")
OVERRIDES = ("name=on cluster", "train.steps=100")


@pytest.mark.parametrize(
    ("typed", "on_cluster", "said"),
    [
        (Typed(), True, "ray job submit jobs/train.py"),
        (Typed(), False, "make train"),
        (Typed(round=2), True, "ray job submit -- python jobs/train.py --round 3"),
        (Typed(round=2), False, "make train ROUND=3"),
        (Typed(Path("mine.yaml")), True, "ray job submit -- python jobs/train.py --config mine.yaml"),
        (Typed(Path("mine.yaml"), ("name=a",)), False, "make train CONFIG=mine.yaml SET=name=a"),
        (Typed(overrides=("name=a",)), True, "ray job submit -- python jobs/train.py name=a"),
    ],
)
def test_the_next_command(typed: Typed, on_cluster: bool, said: str) -> None:
    assert typed.next_job("train", 3, on_cluster=on_cluster) == said


def test_from_a_copy_of_the_submitters_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert Typed().next_job("train", 1, on_cluster=True) == "ray job submit --working-dir . -- python jobs/train.py"


def test_names_with_spaces_arrive_whole() -> None:
    typed = Typed(MINE, OVERRIDES, round=1)
    submitted = shlex.split(typed.next_job("collect", 2, on_cluster=True))
    assert submitted[4:] == ["python", "jobs/collect.py", "--config", str(MINE), "--round", "2", *OVERRIDES]
    made = shlex.split(typed.next_job("collect", 2, on_cluster=False))
    assert made[:3] == ["make", "collect", f"CONFIG={MINE}"] and made[3] == "ROUND=2"
    assert shlex.split(made[4].removeprefix("SET=")) == list(OVERRIDES)


def test_make_takes_what_is_said() -> None:
    said = Typed(Path("configs/one-gpu.yaml"), OVERRIDES, round=1).next_job("collect", 2, on_cluster=False)
    shown = subprocess.run([*shlex.split(said), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    recipe = next(line for line in shown.stdout.splitlines() if "jobs/collect.py" in line)
    given = ["--config", "configs/one-gpu.yaml", "--round", "2", *OVERRIDES]
    assert shlex.split(recipe)[1:] == ["jobs/collect.py", *given]


def test_what_there_is_can_be_looked_at_whatever_was_asked_for() -> None:
    assert Typed(overrides=("rounds=3", "name=a")).make("mlflow") == "make mlflow SET=name=a"
