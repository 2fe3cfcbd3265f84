"""What is computed from answers: intervals, acceptance by position, and a model against an earlier one."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from jf_cluster.config import Config
from jf_cluster.evaluate.comparison import compare, compared, comparison_table, figures, modes_table
from jf_cluster.evaluate.evaluation import (
    EvaluateError,
    Evaluation,
    ModeResult,
    evaluation_path,
    evaluations_until,
    judge,
    load_evaluation,
    save_evaluation,
)
from jf_cluster.evaluate.scoring import acceptance, wilson
from jf_cluster.models import model_hash


def evaluation(round_number: int, right: str, tpf: float, **changes: object) -> Evaluation:
    """``right`` holds a letter a prompt: y right, n wrong."""
    accuracy = right.count("y") / len(right)

    def result(factor: float) -> ModeResult:
        return ModeResult(
            accuracy=accuracy,
            interval=(0.25, 0.75),
            tpf=factor,
            tps=100 * factor,
            same_as_ar=1.0,
            acceptance=(1.0, 0.75, 0.5, 0.25),
        )

    made = Evaluation(
        round=round_number, model_hash="x", prompts=len(right), rejected=0, speed_prompts=1, ar=result(1.0),
        jacobi=result(tpf), multiblock=result(tpf), tps_transformers=200.0, block_size=8, iterations_per_block=2.5,
        agreement_with_base=1.0,
        responses_same_as_base=1.0, unfinished=0, accuracy_drop=0.0, passed=True, reason="within 2 points", seconds=1.0,
        responses={str(i): r for i, r in enumerate(right)}, right={str(i): r == "y" for i, r in enumerate(right)},
    )  # fmt: skip
    return made.model_copy(update=changes)


def test_wilsons_interval() -> None:
    """The figures of Newcombe 1998 (table I), and both ends."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_acceptance_by_position_sums_to_the_tokens_per_forward() -> None:
    assert acceptance([1, 1, 3, 4]) == (1.0, 0.5, 0.5, 0.25)
    assert sum(acceptance([1, 1, 3, 4])) == 9 / 4
    assert acceptance([]) == ()


def test_against_an_earlier_model() -> None:
    now = evaluation(2, "yyynnn", 3.0, iterations_per_block=2.0, agreement_with_base=0.75)
    now = now.model_copy(update={"multiblock": now.multiblock.model_copy(update={"tpf": 5.0, "accuracy": 0.25})})
    found = compare(now, evaluation(1, "ynnynn", 2.0))
    assert found.ar.accuracy == found.jacobi.accuracy == pytest.approx(1 / 6)
    assert found.multiblock.accuracy == pytest.approx(0.25 - 1 / 3) and found.multiblock.tpf_ratio == 2.5
    assert (found.gained, found.lost, found.same_responses) == (2, 1, 0.5)
    assert found.jacobi.tpf_ratio == found.jacobi.tps_ratio == 1.5 and found.ar.tpf_ratio == 1.0
    assert (found.iterations_ratio, found.agreement) == (0.8, -0.25)
    slow = evaluation(0, "yn", 2.0).model_copy(update={"tps_transformers": 800.0})
    assert compare(evaluation(1, "yn", 3.0), slow).jacobi.speedup_ratio == 6.0
    assert found.chance == 1.0  # 2 against 1 says nothing
    assert compare(evaluation(2, "n" * 10, 1.0), evaluation(1, "y" * 10, 1.0)).chance == pytest.approx(2 / 2**10)
    ungraded = compare(evaluation(1, "yn", 1.0).model_copy(update={"right": None}), evaluation(0, "yn", 1.0))
    assert (ungraded.gained, ungraded.lost, ungraded.chance) == (0, 0, None)


def test_what_is_known_of_a_comparison_is_kept(tmp_path: Path) -> None:
    """In the evaluation's file, and by name for MLflow; files of before have none and can be read."""
    config = Config(runs_dir=tmp_path)
    earlier = [evaluation(0, "yn", 1.5, iterations_per_block=None), evaluation(1, "yy", 2.0)]
    now = compared(evaluation(2, "yn", 3.0), earlier)
    path = save_evaluation(config, now)
    assert load_evaluation(config, 2) == now and [c.before for c in now.comparisons] == [0, 1]
    named = [figures(comparison) for comparison in now.comparisons]
    assert named[0]["tpf_ratio_multiblock"] == 2.0 and named[1]["accuracy_ar"] == -0.5
    assert named[1].keys() - named[0].keys() == {"chance", "iterations_ratio"}, "what is not known is left out"
    before = json.loads(path.read_text())
    del before["comparisons"]
    path.write_text(json.dumps(before))
    old = load_evaluation(config, 2)
    assert old is not None and old.comparisons == ()


@pytest.mark.parametrize("made_here", [True, False])
def test_an_evaluation_of_another_model_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, base_model: Path, made_here: bool
) -> None:
    """Whether the model's hash is in its lineage, as where a round made it, or it was put there by hand."""
    config = Config(runs_dir=tmp_path)
    directory = Path(config.model_dir(1))
    shutil.copytree(base_model, directory)
    if made_here:
        (directory / "lineage.json").write_text(json.dumps({"model_hash": "new"}))
    save_evaluation(config, evaluation(0, "yn", 1.5))
    save_evaluation(config, evaluation(1, "yn", 1.5))
    assert load_evaluation(config, 1) is None and [e.round for e in evaluations_until(config, 1)] == [0]
    assert [r.getMessage() for r in caplog.records] == [
        f"{evaluation_path(config, 1)} is of another model 1 than there is now: it counts as not evaluated"
    ]
    now = evaluation(1, "yn", 1.5, model_hash="new" if made_here else model_hash(str(base_model)))
    save_evaluation(config, now)
    assert load_evaluation(config, 1) == now
    shutil.rmtree(directory)
    assert load_evaluation(config, 1) == now


def test_a_base_that_was_made_again_is_evaluated_again(tmp_path: Path) -> None:
    """Where another run's model is the base, which says its hash; no other base is hashed at every look."""
    config = Config.model_validate({"runs_dir": tmp_path / "runs", "model": {"path": str(tmp_path / "base")}})
    (tmp_path / "base").mkdir()
    found = evaluation(0, "yn", 1.5)
    save_evaluation(config, found)
    assert load_evaluation(config, 0) == found
    for made, counts in (("x", True), ("new", False)):
        (tmp_path / "base" / "lineage.json").write_text(json.dumps({"model_hash": made}))
        assert (load_evaluation(config, 0) is not None) == counts


def test_prompts_without_a_reference_answer_are_left_out_of_the_comparison() -> None:
    now = evaluation(1, "yyy", 1.0).model_copy(update={"right": {"0": True, "1": True}})
    change = compare(now, evaluation(0, "nnn", 1.0).model_copy(update={"right": {"1": False, "2": False}}))
    assert (change.gained, change.lost) == (1, 0)


def test_speed_up_is_over_the_strongest_ar() -> None:
    now = evaluation(1, "yn", 3.0)
    assert (now.strongest_ar_tps, now.speedup("jacobi"), now.speedup("ar")) == (200.0, 1.5, 0.5)
    assert now.model_copy(update={"tps_transformers": 50.0}).speedup("jacobi") == 3.0


def test_the_tables_say_it() -> None:
    out = io.StringIO()
    console = Console(file=out, width=150)
    now, before = evaluation(2, "yyynnn", 3.0, passed=False, reason="fell"), evaluation(0, "ynnynn", 2.0)
    console.print(modes_table(now))
    console.print(comparison_table([compare(now, before)]))
    text = out.getvalue()
    assert "1.50  1.50" in text and "AR, Jacobi, multi" in text
    assert "model 2 on held_out, 6 prompts: FAILED, fell" in text
    assert "50.0 (25.0 to 75.0)" in text and "ar, transformers" in text
    assert "75  25  0  0" in text and "2.50 Jacobi iterations per block of 8" in text
    assert "base" in text and "+16.7" in text and "2, 1" in text


def test_a_file_of_another_version_is_said_to_be_so(tmp_path: Path) -> None:
    config = Config(runs_dir=tmp_path)
    path = evaluation_path(config, 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"round": 0, "failed": false}')
    with pytest.raises(EvaluateError, match=r"round-000.json is not an evaluation of this version"):
        load_evaluation(config, 0)


@pytest.mark.parametrize(
    ("accuracy", "base", "passed"),
    [(0.94, 0.96, True), (0.93, 0.96, False), (1.0, 0.5, True), (None, None, True), (0.0, 0.02, True)],
)
def test_the_gate_allows_the_margin_and_no_more(accuracy: float | None, base: float | None, passed: bool) -> None:
    assert judge(accuracy, base, 0.02)[0] is passed
