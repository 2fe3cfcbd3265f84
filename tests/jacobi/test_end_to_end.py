"""From random weights to a faster decoder, cut down to seconds: whole, interrupted, and where there is no Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import end_to_end
from jf_cluster.tiny import pretrain

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "--device", "cpu", "--events", "1", "2", "--max-total", "40",
    "--width", "32", "--inner-width", "64", "--layers", "2", "--heads", "4", "--key-value-heads", "2",
    "--pretraining-steps", "12", "--pretraining-tokens", "512", "--workers", "0", "--checkpoint-s", "0",
    "--block-sizes", "4", "8", "--prompts", "6", "--steps", "4", "--step-tokens", "400", "--max-new-tokens", "20",
    "--decoding-block", "8", "--held-out", "4", "--speed-prompts", "2", "--repeats", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "POOL_PROBLEMS", 16)  # of some four steps: there are checkpoints to go on from
        patch.setattr(pretrain, "LOG_STEPS", 2)
        patch.setattr(end_to_end, "use_threads", lambda _: None)  # it changes arithmetic in the whole process
        yield


def run(folder: Path, *more: str) -> dict[str, Any]:
    figures = folder.with_suffix(".json")
    end_to_end.main([*SMALL, "--output", str(folder), "--json", str(figures), *more])
    return json.loads(figures.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a call makes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("end_to_end") / "whole"
    figures = run(folder)
    for number in range(3):
        assert figures[f"tpf_ar_round_{number}"] == 1 <= figures[f"tpf_jacobi_round_{number}"]
        # In float32 every mode writes what AR writes.
        assert figures[f"share_differing_jacobi_round_{number}"] == 0
        assert figures[f"share_differing_multiblock_round_{number}"] == 0
    last = [figures[f"ratio_speedup_{side}_vs_ar_round_2"] for side in end_to_end.OURS]
    assert figures["ratio_speedup_vs_ar"] == max(last) and figures["steps_round_0"] == 12
    return folder


class CutError(RuntimeError):
    """Stands for a kill."""


def cut_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The ``call``-th call of a function fails, those before it do what they did."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, call))

    def cut(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise CutError
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, cut)


def test_what_was_cut_anywhere_ends_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cut"
    clip = (torch.nn.utils, "clip_grad_norm_")  # once a step
    for owner, name, call, there in (
        (*clip, 7, {"pretraining.pt"}),  # in the pretraining, between two checkpoints
        (*clip, 4, {"pretraining.pt"}),  # and again
        (end_to_end, "write_json", 2, {"round-000"}),  # with the base there and its evaluation lost
        (*clip, 3, {"round-000", "round-000.json"}),  # in the first round's training
        (end_to_end, "evaluate", 2, {"round-000", "round-000.json", "round-001", "round-001.json", "round-002"}),
    ):
        with monkeypatch.context() as patch, pytest.raises(CutError):
            cut_at(patch, owner, name, call)
            run(folder)
        found = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
        assert found - {"effort.json"} == there
    run(folder)
    for number in range(3):
        name = f"round-{number:03d}"
        one, other = (load_file(f / name / "model.safetensors") for f in (whole, folder))
        assert all(torch.equal(one[key], other[key]) for key in one)
        one, other = (json.loads((f / f"{name}.json").read_text()) for f in (whole, folder))
        assert all(one[key] == other[key] for key in one if "tokens_per_s" not in key and "speedup" not in key)
    one, other = (json.loads((f / "curves.json").read_text()) for f in (whole, folder))
    for curves in (one, other):
        assert len(curves["training"][0].pop("seconds")) == 6
    assert one == other and one["training"][0]["step"] == [0, 2, 4, 6, 8, 10]
    assert one["training"][0]["loss"][-1] < one["training"][0]["loss"][0]
    assert [len(training["ar"]) for training in one["training"][1:]] == [4, 4]


def test_a_second_call_makes_nothing_anew(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("pretrain", "force", "evaluate"):
        cut_at(monkeypatch, end_to_end, stage, 1)
    assert run(whole)["steps_round_0"] == 12


def test_a_pretraining_by_the_clock_ends_with_it(tmp_path: Path) -> None:
    figures = run(tmp_path / "timed", "--pretraining-steps", "0", "--minutes", "0.05", "--block-sizes", "4")
    assert 3 <= figures["seconds_round_0"] < 60 and figures["steps_round_0"] > 0
    assert "accuracy_round_2" not in figures


ELSEWHERE = """
import sys
for name in ("ray", "deepspeed", "mlflow", "pydantic", "omegaconf", "peft", "datasets"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
from bench import end_to_end
end_to_end.main(sys.argv[1:])
"""


def test_it_needs_neither_ray_nor_deepspeed_nor_mlflow_and_decodes_in_bfloat16(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    asked = ["--dtype", "bfloat16", "--workers", "1", "--output", str(tmp_path / "run"), "--json", str(figures)]
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *SMALL, *asked], cwd=tmp_path, env=quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| round | accuracy |" in done.stdout and json.loads(figures.read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--heads 5", "multiple of the heads"),
        ("--heads 32", "multiple of the heads"),
        ("--key-value-heads 3", "multiple of the heads"),
        ("--heads 0", "all but the steps must be above 0"),
        ("--minutes -1", "all but the steps must be above 0"),
        ("--events 5 4", "ascending pair"),
        ("--events 5", "expected 2 arguments"),
        ("--block-sizes 4 0", "block sizes must be at least 1"),
        ("--steps 0", "above 0"),
        ("--workers -1", "workers must be at least 0"),
        ("--schedule falling", "invalid choice"),
        ("--responses mine", "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "none", *wrong.split())
    assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_directory_of_another_run_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(whole, "--steps", "5")
    assert "name another" in capsys.readouterr().err
