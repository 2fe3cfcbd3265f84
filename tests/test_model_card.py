"""The card of an exported model tells what was measured, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jf_cluster.config import TINY_BASE
from jf_cluster.evaluate.evaluation import Evaluation, ModeResult
from jf_cluster.model_card import write_card
from jf_cluster.package_decoder import write_decoder


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


@pytest.mark.parametrize("penalty", [None, 1.0, 1.05])
def test_the_cards_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], penalty: float | None
) -> None:
    target = tmp_path / "round-001"
    shutil.copytree(TINY_BASE, target)
    settings = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": penalty}))
    write_decoder(target)
    text = write_card(target, base=TINY_BASE, dtype="float32").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    assert "tokens per forward" in capsys.readouterr().out
    assert ("repetition_penalty" in text) == ("sets aside the 1.05" in text) == (penalty == 1.05)
