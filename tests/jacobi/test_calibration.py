"""``auto``: the choice follows what was measured, is kept beside the model, and is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from jf_cluster.jacobi import calibration
from jf_cluster.jacobi.calibration import Choice, calibrate, interpolate, machine, store, stored
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import Drafting

from .conftest import END, make_model, oracle_responses, random_prompts


@pytest.fixture
def on_disk(tmp_path: Path) -> PreTrainedModel:
    make_model("qwen2").save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS", 16)
    monkeypatch.setattr(calibration, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(calibration, "POOLS", (0, 2))
    monkeypatch.setattr(calibration, "BLOCKS", (2,))


def test_the_choice_follows_the_times(qwen2: PreTrainedModel, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [p.tolist() for p in random_prompts([5, 9])]
    # Where a token more costs nothing, as on a GPU that reads its weights once, any accepted token is a gain …
    monkeypatch.setattr(calibration, "forward_seconds", lambda *_: dict.fromkeys(calibration.WIDTHS, 0.01))
    free = calibrate(qwen2, prompts, frozenset([END]))
    assert free.drafting.mode != "ar" and free.speedup > 1
    best = max(free.measured, key=lambda m: m.tps)
    assert best.tps <= calibration.MARGIN * next(m.tps for m in free.measured if m.drafting == free.drafting)
    for m in free.measured:
        assert m.tps == pytest.approx(m.tpf / 0.01)
    # … and where every token costs a forward of its own there is nothing to gain.
    monkeypatch.setattr(calibration, "forward_seconds", lambda *_: {w: 0.01 * w for w in calibration.WIDTHS})
    dear = calibrate(qwen2, prompts, frozenset([END]))
    assert dear.drafting.mode == "ar" and dear.explanation.startswith(
        "autoregressive: 10.00 ms a forward, 100 tokens/s"
    )


def test_times_are_measured_and_interpolated(qwen2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WIDTHS", (1, 4, 16))
    times = calibration.forward_seconds(qwen2, 20)
    assert times.keys() == {1, 4, 16} and all(t > 0 for t in times.values())
    known = {1: 1.0, 4: 4.0, 16: 10.0}
    assert [interpolate(known, w) for w in (1, 2.5, 4, 10, 16, 20)] == [1.0, 2.5, 4.0, 7.0, 10.0, 12.0]


def test_auto_calibrates_once_and_keeps_the_choice_beside_the_model(on_disk: PreTrainedModel, brief: None) -> None:
    prompts = [p.tolist() for p in random_prompts([5, 9])]
    assert stored(on_disk) is None
    got = generate(on_disk, prompts, max_new_tokens=20, end_ids=[END], drafting="auto")
    assert [g.tokens for g in got] == oracle_responses(on_disk, random_prompts([5, 9]), 20)
    known = stored(on_disk)
    assert known is not None and known.explanation
    file = Path(on_disk.name_or_path) / "decoding.json"
    entry = json.loads(file.read_text())[machine(on_disk)]
    assert Drafting(**entry["drafting"]) == known.drafting and len(entry["measured"]) >= 5
    # What is stored is used: nothing is measured again, and this setting's drafts are the ones forwarded.
    store(on_disk, Choice(Drafting("jacobi", 3), "because", 1.0))
    (made,) = generate(on_disk, prompts[:1], max_new_tokens=20, end_ids=[END], drafting="auto")
    assert made.forwards < made.forwarded_tokens <= 3 * made.forwards
    # Another machine's choice is kept too, but not taken.
    file.write_text(json.dumps({"another machine": entry}))
    assert stored(on_disk) is None
    store(on_disk, known)
    assert json.loads(file.read_text()).keys() == {"another machine", machine(on_disk)}


def test_a_damaged_file_is_made_anew_and_a_model_without_directory_works(
    on_disk: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(on_disk.name_or_path) / "decoding.json").write_text("{")
    assert stored(on_disk) is None and "is made anew" in caplog.text
    assert store(on_disk, Choice(Drafting("ar"), "why", 1.0)) is not None and stored(on_disk).drafting.mode == "ar"
    (Path(on_disk.name_or_path) / "decoding.json").write_text(json.dumps({machine(on_disk): {"drafting": {"n": 3}}}))
    assert stored(on_disk) is None and "cannot be used and is made anew" in caplog.text
    model = make_model("qwen2")
    assert stored(model) is None and store(model, Choice(Drafting("ar"), "why", 1.0)) is None
    assert stored(model).explanation == "why"  # for this process
