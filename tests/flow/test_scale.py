"""The benchmark of scale, small: simulated collectors under the real dispatcher, and a round of 10,000 prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import many_prompts, scale
from tests.store.conftest import make_provenance, make_trajectory

COUNT = 10_000


@pytest.mark.usefixtures("local_ray")
def test_simulated_collectors_write_real_shards_and_wait_for_nothing_but_their_model(tmp_path: Path) -> None:
    rows = [make_trajectory(f"{i}") for i in range(4)]
    window, _ = scale.simulation(tmp_path / "store", 3, rows, make_provenance(), [1.0, 1.2], 8, 2.5)
    assert all(len(times) >= 2 for times in window.done_at) and window.batches >= 5
    assert 0.3 < window.in_model <= 1.0  # 0.98 where nothing else uses the cores
    assert window.prompts_per_s == pytest.approx(3 * 8 / 1.1 * window.in_model, rel=0.2)


def test_a_round_of_ten_thousand_prompts(tmp_path: Path) -> None:
    """Each step checks by itself what it finds."""
    many_prompts.write_source(tmp_path / "prompts.jsonl", COUNT)
    for step in (many_prompts.write_round, many_prompts.resume, many_prompts.seal, many_prompts.plan):
        assert step(tmp_path, COUNT) > 0
    round_ = many_prompts.round_of(tmp_path, COUNT)
    assert round_.manifest.rejects == len(round_.rejects()) == 5
    assert not round_.committed_ids() & round_.rejects().keys()
