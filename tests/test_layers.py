"""The layers of DESIGN.md: who may import whom, read from the source so that an unused import counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "trajectory_store": {"torch", "ray", "deepspeed", "mlflow", "transformers", "datasets", "jf_cluster"},
    "jf_cluster/jacobi": {"ray", "deepspeed", "mlflow"},
    "jf_cluster/collect": {"deepspeed", "mlflow"},
    "jf_cluster/evaluate": {"deepspeed", "mlflow"},
}
"""Folder → packages that nothing in it may import."""

ORDER = ("config", "jacobi", "evaluate/graders", "collect", "train", "evaluate", "rounds")
"""Rooms of jf_cluster, left to right: imports point to the left. A room within another is none of its files."""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_layer_does_not_know_what_is_not_its_business(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        known = {name.split(".")[0] for name in imports(file)}
        assert not known & FORBIDDEN[folder], f"{file.relative_to(ROOT)} imports {known & FORBIDDEN[folder]}"


def test_the_algorithm_imports_only_itself_and_the_store() -> None:
    for file in sorted((ROOT / "jf_cluster" / "jacobi").rglob("*.py")):
        ours = [name for name in imports(file) if name.startswith("jf_cluster.")]
        assert all(name.startswith("jf_cluster.jacobi") for name in ours), f"{file.relative_to(ROOT)}: {ours}"


def room_of(module: str) -> str | None:
    found = [room for room in ORDER if f"{module}.".startswith(f"jf_cluster.{room.replace('/', '.')}.")]
    return max(found, key=len, default=None)


def test_imports_point_to_the_left() -> None:
    for place, room in enumerate(ORDER):
        path = ROOT / "jf_cluster" / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            if room_of(".".join(file.relative_to(ROOT).with_suffix("").parts)) != room:
                continue
            for name in imports(file):
                if (known := room_of(name)) is not None:
                    assert ORDER.index(known) <= place, f"{file.relative_to(ROOT)} imports {name}"


def test_jobs_hold_no_logic() -> None:
    for file in sorted((ROOT / "jobs").glob("*.py")):
        assert {name.split(".")[0] for name in imports(file)} <= {"typer", "jf_cluster"}
        assert len(file.read_text().splitlines()) <= 30 and file.stat().st_mode & 0o111, f"{file} must be executable"
