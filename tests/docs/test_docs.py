"""The documentation is true: links lead somewhere, the reference is the schema's, and every shell block runs.

A comment before a block may mark it: one that ``serves`` runs until what it serves answers and is then interrupted; one
for a ``gpu`` is not run. All others must succeed. Lines that begin with ``make test`` are what runs this. Everything is
typed in one copy of the repository, a page from top to bottom, with sizes cut down through make's ``SET``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jf_cluster.config_reference import reference

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "prompts.per_round=16 prompts.held_out=8 evaluate.prompts=6 evaluate.speed_prompts=1 evaluate.max_new_tokens=24 "
    "collect.max_new_tokens=32 collect.workers=1 train.workers=1 train.steps=3 train.warmup_steps=1"
)
BLOCK = re.compile(r"^(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def test_the_configuration_page_is_the_schemas() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference(), "run: python -m jf_cluster config --reference > docs/configuration.md"
    assert "|  |" not in page, "a key without a meaning"


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {
        page: (tmp_path / page.stem / "index.html") for page in (ROOT / "docs").glob("*.md") if page.stem != "index"
    }
    assert [page for page, html in pages.items() if "```" in html.read_text()] == [], "a block that is not rendered"


def test_the_readmes_links_lead_somewhere() -> None:
    links = [link for link in LINK.findall((ROOT / "README.md").read_text()) if "://" not in link]
    assert len(links) > 5 and [link for link in links if not (ROOT / link).exists()] == []


def test_the_tests_that_operations_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "operations.md").read_text())
    assert len(named) > 15
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository whose ``.venv`` is the environment this runs in."""
    target = tmp_path_factory.mktemp("docs") / "clone"
    shutil.copytree(
        ROOT, target, ignore=shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".venv", "runs", ".hypothesis")
    )
    environment = target / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in ("ready", "installing"):
            (environment / entry.name).symlink_to(entry)
    (environment / "ready").touch()  # what make would install is there
    return target


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/tutorial.md", marks=pytest.mark.slow)])
def test_every_shell_block_runs(clone: Path, page: str) -> None:
    found = list(BLOCK.finditer((ROOT / page).read_text()))
    blocks = [(m[1], m[3]) for m in found if m[2] in ("sh", "bash", "shell", "console")]
    unmarked = [m[3] for m in found if not m[2] and re.search("make |python ", m[3])]
    assert blocks and not unmarked, "commands belong into a block marked sh"
    for mark, text in blocks:
        assert mark in (None, "serves", "gpu"), f"unknown mark {mark!r}"
        lines = [line for line in text.splitlines() if not line.startswith("make test")]
        if mark == "serves":
            _serve(clone, "\n".join(lines))
        elif mark != "gpu":
            _run(clone, "\n".join(lines))


def _shell(clone: Path, script: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(clone),
        "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SET": SMALL,
    }
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _run(clone: Path, script: str) -> None:
    process = _shell(clone, script)
    try:
        output, _ = process.communicate(timeout=800)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{script}\n{output}"


def _serve(clone: Path, script: str) -> None:
    process = _shell(clone, script)
    said: list[str] = []
    try:
        address = next(_addresses(process, said), None)
        assert address is not None, f"{script}\nsaid no address:\n{''.join(said)}"
        _await_answer(address)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _addresses(process: subprocess.Popen[str], said: list[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        yield from re.findall(r"http://127\.0\.0\.1:\d+", line)


def _await_answer(address: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, if only that there is nothing at /
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")
