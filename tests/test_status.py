"""``python -m jf_cluster status`` from files alone: before, during and after a run, killed, failed, and refreshed."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jf_cluster.config import Config
from jf_cluster.run_log import kept_log, last_troubles
from jf_cluster.status import StatusReader, rendered
from jf_cluster.tracking.activity import FILE, read_activity, working
from trajectory_store import Provenance, Trajectory, TrajectoryStore

PROVENANCE = Provenance("m" * 64, "t" * 64, block_size=4, seed=0, round_number=1, code_version="0", config={})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config.model_validate({"name": "run", "runs_dir": tmp_path, "rounds": 2, "prompts": {"per_round": 6}})
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return config


def shown(config: Config, reader: StatusReader | None = None) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(rendered((reader or StatusReader(config)).read()))
    return console.export_text()


def commit(config: Config, *prompt_ids: str) -> None:
    with TrajectoryStore(config.store_url).round(1).writer(PROVENANCE) as writer:
        for prompt_id in prompt_ids:
            tokens = np.arange(4, dtype=np.int32)
            accepted, tail = np.array([0], np.int32), np.array([9, 9, 9, 9], np.int32)
            writer.append(Trajectory(prompt_id, tokens, tokens, True, np.array([1], np.int32), accepted, tail))


def test_before_the_first_stage(config: Config) -> None:
    text = shown(config)
    assert "8 stages left" in text and "no stage has run yet" in text and "last checkpoint: none yet" in text


def test_a_round_is_followed_through_its_stages(config: Config) -> None:
    reader = StatusReader(config)
    folder = TrajectoryStore(config.store_url).round(1)
    with working(config.run_dir, 1, "collect") as activity:
        commit(config, "a", "b")
        folder.reject("c", "too long")
        activity.progress("prompts", 3, 6, 1.5, "120 tokens/s")
        activity.write()
        text = shown(config, reader)
        assert "collecting round 1 for" in text and "3 of 6 prompts · 1.5/s · 2 s left · 120 tokens/s" in text
        assert "2 of 6 · 1 rejected" in text and "8 stages left" in text
        commit(config, "d", "e", "f")
        assert "5 of 6 · 1 rejected" in shown(config, reader), "read again, not remembered"
        folder.seal(PROVENANCE)
    assert "7 stages left" in shown(config, reader) and "5 · 1.00 iterations/block · 1 rejected" in shown(
        config, reader
    )

    checkpoint = config.run_dir / "checkpoints" / "round-001" / "step-000200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").touch()
    steps = config.run_dir / "training" / "round-001.steps.jsonl"
    steps.parent.mkdir()
    steps.write_text(json.dumps({"step": 200}) + "\n" + json.dumps({"step": 210}) + "\n")
    text = shown(config, reader)
    assert "step 210 of 300" in text and "last checkpoint: round-001 step-000200, " in text
    with steps.open("a") as log:
        log.write('{"step": 22')  # a line that is being written
    assert "step 210 of 300" in shown(config, reader)
    steps.write_text('{"step": 2')
    assert "of 300" not in shown(config, reader)
    assert "last stage: collecting round 1, finished " in text


def test_an_evaluation_of_another_model_is_not_shown(config: Config) -> None:
    model = config.run_dir / "models" / "round-001" / "lineage.json"
    found = config.run_dir / "evaluation" / "round-001.json"
    for path in (model, found):
        path.parent.mkdir(parents=True)
    mode = {"accuracy": 0.5, "tpf": 2.5}
    modes = {"ar": mode, "jacobi": mode, "multiblock": mode}
    found.write_text(json.dumps({"model_hash": "old", "passed": True, **modes}))
    model.write_text(json.dumps({"model_hash": "old"}))
    assert "TPF 2.50" in shown(config) and "6 stages left" in shown(config)
    model.write_text(json.dumps({"model_hash": "new"}))
    assert "TPF 2.50" not in shown(config) and "7 stages left" in shown(config)
    found.write_text("")
    assert "round-001.json cannot be read" in shown(config) and "7 stages left" in shown(config)


def test_a_checkpoint_that_is_removed_meanwhile_is_not_the_last(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [config.run_dir / "checkpoints" / "round-001" / f"step-{n:06d}" / "complete.json" for n in (100, 200)]
    for mark in marks:
        mark.parent.mkdir(parents=True)
        mark.touch()
    listed = Path.glob

    def then_removed(self: Path, pattern: str) -> list[Path]:
        found = list(listed(self, pattern))
        if "complete" in pattern:
            marks[1].unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", then_removed)
    assert "last checkpoint: round-001 step-000100, " in shown(config)
    marks[0].unlink()
    assert "last checkpoint: none yet" in shown(config)


def test_a_failed_stage_says_why_and_a_killed_one_that_it_is_gone(config: Config) -> None:
    with pytest.raises(OSError, match="disk full"), kept_log(config.run_dir), working(config.run_dir, 2, "train"):
        logging.getLogger("jf_cluster.train").warning("worker 3 is replaced\nand its prompts are redone")
        raise OSError("disk full")
    text = shown(config)
    assert "training round 2, failed " in text and " ago OSError: disk full" in text
    assert "WARNING worker 3 is replaced ⏎ and its prompts are redone" in text and "ERROR OSError: disk full" in text

    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with working(config.run_dir, 2, "train") as activity:
        activity.progress("steps", 30, 300, 1.0)
        activity.write()
        file = config.run_dir / FILE.format(stage="train")
        killed = json.loads(file.read_text()) | {"pid": int(ended.stdout)}
        file.write_text(json.dumps(killed))
        assert "killed while training round 2 (30 of 300 steps" in shown(config)


def test_a_pid_that_was_given_to_another_process_is_not_the_run(config: Config) -> None:
    with working(config.run_dir, 1, "collect"):
        (now,) = read_activity(config.run_dir)
        assert now.alive
        # This process, but a stage that began before it did: the number was another process's then.
        file = config.run_dir / FILE.format(stage="collect")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"begun": now.begun - 10**6}))
        (read,) = read_activity(config.run_dir)
        assert not read.alive


def test_stages_at_work_together_are_all_shown(config: Config) -> None:
    with working(config.run_dir, 1, "collect"), working(config.run_dir, 1, "train"):
        text = shown(config)
        assert "collecting round 1 for" in text and "training round 1 for" in text
    assert [now.stage for now in read_activity(config.run_dir)] == ["collect"], "the one that ended last"
    with working(config.run_dir, 1, "evaluate"):
        assert "evaluating round 1 for" in shown(config)
    assert not list(config.run_dir.glob(FILE.format(stage="[ct]*"))), "what is over is forgotten"


def test_stages_that_begin_together_may_clear_up_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with working(config.run_dir, 1, "evaluate"):
        pass
    (over,) = read_activity(config.run_dir)
    (config.run_dir / FILE.format(stage="evaluate")).unlink()  # by the other stage, after this one has read it
    monkeypatch.setattr("jf_cluster.tracking.activity._recorded", lambda _: [over])
    with working(config.run_dir, 1, "train"):
        pass


def test_only_the_last_troubles_are_shown(config: Config) -> None:
    with kept_log(config.run_dir):
        for number in range(2000):
            logging.getLogger("jf_cluster").warning("trouble %d %s", number, "x" * 100)
    logging.getLogger("jf_cluster").warning("outside")
    assert [line.split()[4] for line in last_troubles(config.run_dir, 3)] == ["1997", "1998", "1999"]


def _shown(terminal: int, text: str) -> None:
    """Read what is written to a terminal until ``text`` comes."""
    written = ""
    while text not in written:
        written += os.read(terminal, 65536).decode(errors="replace")


def test_the_command_prints_once_or_refreshes(config: Config) -> None:
    (config.run_dir.parent / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "jf_cluster", "status", "--config", str(config.run_dir.parent / "run.yaml")]
    root = Path(__file__).parent.parent
    once = subprocess.run([*command, "--once"], capture_output=True, text=True, timeout=60, cwd=root, check=True)
    assert "8 stages left" in once.stdout
    ours, theirs = pty.openpty()  # it refreshes on a terminal only
    wide = os.environ | {"COLUMNS": "200"}
    live = subprocess.Popen([*command, "--every", "0.2"], stdout=theirs, cwd=root, env=wide)
    os.close(theirs)
    try:
        _shown(ours, "8 stages left")
        commit(config, "a")
        TrajectoryStore(config.store_url).round(1).seal(PROVENANCE)
        _shown(ours, "7 stages left")
    finally:
        live.kill()
        live.wait()
        os.close(ours)
    missing = subprocess.run([*command, "name=other"], capture_output=True, text=True, timeout=60, cwd=root)
    assert missing.returncode == 2 and "there is no run in" in missing.stderr
