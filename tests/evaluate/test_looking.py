"""The close look at a model's decoding is held to the evaluation's own limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.prompts import held_out_prompts
from jf_cluster.evaluate.looking import Looker
from jf_cluster.jacobi import calibration
from jf_cluster.jacobi.engine import Row
from jf_cluster.models import load_tokenizer
from tests.flow.conftest import small_config


def test_no_response_is_longer_than_the_evaluations(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_rows, written = calibration.decode_rows, []

    def watched(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[object]:
        yield from decode_rows(model, rows)
        written.extend(len(row.tokens) for row in rows)

    monkeypatch.setattr(calibration, "decode_rows", watched)
    monkeypatch.setattr(calibration, "WIDTHS", (1, 4))
    config = small_config(tmp_path, base_model, evaluate={"prompts": 3, "max_new_tokens": 7})
    look = Looker(config, 0, WorkerModels(config)).look(held_out_prompts(config, load_tokenizer(config))[:3])
    assert written and max(written) == 7
    assert len(look.tokens) <= 7
