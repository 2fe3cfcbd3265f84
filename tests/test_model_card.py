"""The card of an exported model tells what was measured, and nothing of the machine it was made on."""

from __future__ import annotations

from pathlib import Path

from jf_cluster.evaluate.evaluation import Evaluation, ModeResult
from jf_cluster.model_card import write_card


def evaluation(round_number: int, tpf: float) -> Evaluation:
    def result(factor: float) -> ModeResult:
        return ModeResult(accuracy=0.951, tpf=factor, tps=400 * factor, same_as_ar=1.0)

    return Evaluation(
        round=round_number, model_hash="x", prompts=240, rejected=0, speed_prompts=24, ar=result(1.0),
        jacobi=result(tpf), multiblock=result(tpf + 0.5), agreement_with_base=0.944, responses_same_as_base=0.5,
        unfinished=0, accuracy_drop=0.0, passed=True, reason="", seconds=1.0, responses={},
    )  # fmt: skip


def test_the_card_has_the_measured_table(tmp_path: Path) -> None:
    base = tmp_path / "somewhere" / "base-model"
    base.mkdir(parents=True)
    target = tmp_path / "round-003"
    target.mkdir()
    text = write_card(target, base=str(base), dtype="float32").read_text()
    assert "Not evaluated yet." in text and "base_model:" not in text
    text = write_card(
        target, base=str(base), dtype="float32", round_number=3,
        evaluations={"base": evaluation(0, 1.2), "round 3": evaluation(3, 2.5)},
    ).read_text()  # fmt: skip
    assert "| round 3 | jacobi | 2.50 | 1000 | 2.50 | 95.1% | 100.0% |" in text
    assert "| base | multiblock | 1.70 |" in text and "94.4%" in text and "round 3, from `base-model`" in text
    assert str(tmp_path) not in text
    hub = write_card(target, base="someone/model", dtype="bfloat16").read_text()
    assert hub.startswith("---\nlibrary_name: transformers") and "base_model: someone/model\n---" in hub
