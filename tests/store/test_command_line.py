"""``python -m trajectory_store``: what people see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.conftest import BLOCK_SIZE, make_trajectory
from trajectory_store import Provenance, Round
from trajectory_store.__main__ import main
from trajectory_store.drawing import draw_trajectory


@pytest.fixture
def path(round_: Round, provenance: Provenance) -> str:
    with round_.writer(provenance) as writer:
        for i in range(10):
            writer.append(make_trajectory(f"p{i}", response_tokens=20))
    round_.reject("x", "too long")
    round_.seal(provenance)
    return str(Path(round_.folder.path).parent)


def test_ls(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", path, f"{path}/round-001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("sealed" in line and "10 rows" in line and "1 rejects" in line for line in lines)


def test_ls_of_an_open_round(round_: Round, provenance: Provenance, capsys: pytest.CaptureFixture[str]) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
    round_.reject("x", "too long")
    assert main(["ls", str(Path(round_.folder.path))]) == 0
    line = capsys.readouterr().out
    assert "open" in line and "1 rows" in line and "1 rejects" in line


def test_rejects_are_shown_and_tried_again(
    round_: Round, provenance: Provenance, capsys: pytest.CaptureFixture[str]
) -> None:
    round_.reject("x", "too long")
    round_.reject("y", "worker died")
    path = round_.folder.path
    for arguments in (["rejects", path], ["rejects", path, "--retry"]):
        assert round_.rejects().keys() == {"x", "y"}
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert set(lines[:2]) == {f"{path}  x  too long", f"{path}  y  worker died"}
    assert lines[2] == f"{path}: 2 are tried again when the round is collected" and round_.rejects() == {}
    round_.reject("x", "still too long")
    round_.seal(provenance)
    assert main(["rejects", path, "--retry"]) == 2
    assert "is sealed" in capsys.readouterr().err and round_.rejects().keys() == {"x"}


def test_show(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", path, "--id", "p3"]) == 0
    row = make_trajectory("p3", response_tokens=20)
    out = capsys.readouterr().out
    assert out.splitlines() == list(draw_trajectory(row, BLOCK_SIZE, colour=False))
    assert len(out.splitlines()) == 1 + 3 + len(row.accepted) + 3
    assert main(["show", path, "--row", "2", "--colour", "always"]) == 0
    assert "\x1b[32m" in capsys.readouterr().out


def test_stats(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", path]) == 0
    out = capsys.readouterr().out
    rows = [make_trajectory(f"p{i}", response_tokens=20) for i in range(10)]
    assert f"{sum(len(row.prompt) for row in rows)} prompt, 200 response, {sum(len(r.tails) for r in rows)}" in out
    assert f"blocks 30, iterations per block {sum(len(r.accepted) for r in rows) / 30:.2f}" in out


def test_verify(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", path]) == 0
    shard = next(Path(path).glob("round-001/shard-*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    assert main(["verify", path]) == 1
    assert shard.name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "nobody"], "has no row for the prompt 'nobody'"),
        (["--id", os.fsdecode(b"\xff")], "has no row for the prompt '\\udcff'"),
        (["--row", "10"], "has 10 rows, counted from 0; there is no row 10"),
        (["--row", "-1"], "there is no row -1"),
    ],
)
def test_rows_that_are_not_there(
    path: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["show", path, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["compact", "x", "--shard-mib", "0"], ["import", "x", "y/round-001", "--block-size", "0"], ["show"], ["nonsense"]],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m trajectory_store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "{tmp}/nowhere.jsonl", "{tmp}/s/round-001", "--block-size", "4"], "nowhere.jsonl cannot be read"),
        (["import", "{tmp}/nowhere.jsonl", "{tmp}/s", "--block-size", "4"], "names no round"),
        (["export", "{tmp}/s/round-001", "{tmp}/out"], "is not sealed"),
        (["stats", "nosuch://x"], "nosuch://x"),
        (["verify", "{tmp}/s/round-007"], "holds no rounds"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_as_a_program(path: str) -> None:
    command = [sys.executable, "-m", "trajectory_store", "ls", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "10 rows" in done.stdout


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path / "nowhere")]) == 2
    assert "holds no rounds" in capsys.readouterr().err
