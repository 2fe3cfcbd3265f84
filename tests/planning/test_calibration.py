"""A calibration is a run: real Ray, ranks and decoding, on a few prompts, that leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.config import load_config
from jf_cluster.planning.calibration import BATCHES, EVALUATED, STEPS, miniature

TINY = str(Path(__file__).parent.parent.parent / "configs" / "tiny.yaml")


def test_a_miniature_differs_in_amounts_and_places_only(tmp_path: Path) -> None:
    config = load_config(TINY, ["prompts.per_round=5000"])
    small = miniature(config, tmp_path)
    assert small.prompts.per_round == BATCHES * 2 * 64 and small.train.steps == STEPS
    assert small.evaluate.prompts == EVALUATED * 2
    assert (small.evaluate.speed_prompts, small.evaluate.multiblock_prompts) == (1, 10), "of 64 as 8 and 120 of 800"
    assert small.run_dir.parent == tmp_path and small.store_url.startswith(str(tmp_path))
    assert (small.collect, small.noise, small.model) == (config.collect, config.noise, config.model)
    less = load_config(TINY, ["prompts.per_round=10", "train.steps=3", "evaluate.prompts=5"])
    small = miniature(less, tmp_path)
    assert (small.prompts.per_round, small.train.steps, small.evaluate.prompts) == (10, 3, 5)


@pytest.mark.slow
def test_a_plan_measures_the_embedded_run(tmp_path: Path) -> None:
    small = [
        "collect.workers=1",
        "train.workers=1",
        "train.micro_batches_per_step=1",
        "train.micro_batch_tokens=600",
        "train.steps=3",
        "prompts.per_round=8",
        "evaluate.prompts=4",
        "evaluate.speed_prompts=1",
    ]
    done = CliRunner().invoke(app, ["plan", "--config", TINY, f"runs_dir={tmp_path / 'runs'}", *small])
    assert done.exit_code == 0, done.output
    assert "Time, from that miniature" in done.stdout
    assert "held_out" not in done.stdout, "the miniature's own tables are not shown"
    times = re.findall(r"│ (collect|train|evaluate) +│ +(\d) │ +([\d.]+) (?:s|min) │", done.stdout)
    assert [(name, count) for name, count, _ in times] == [("collect", "4"), ("train", "3"), ("evaluate", "4")]
    assert all(float(seconds) > 0 for name, _, seconds in times if name != "collect"), "eight prompts may take 0 s"
    tokens, store_bytes = map(float, re.findall(r"([\d.]+) tokens a response, ([\d.]+) bytes", done.stdout)[0])
    assert 60 < tokens < 130, "97 by docs/tiny.md"
    assert 9 < store_bytes < 40, "9.1 by docs/store.md, and the head of a shard that holds 8 rows"
    assert list((tmp_path / "runs").iterdir()) == []
