"""Keyed Gumbel noise: repeatable, well distributed, and filtered as asked."""

from __future__ import annotations

import pytest
import torch

from jf_cluster.jacobi.sampling import Sampling, gumbel


def test_noise_is_a_function_of_key_position_and_token() -> None:
    keys, positions = torch.tensor([1, 1, 2]), torch.tensor([0, 5, 0])
    together = gumbel(keys, positions, 50)
    for row in range(3):
        assert torch.equal(together[row], gumbel(keys[row : row + 1], positions[row : row + 1], 50)[0])
    assert len({tuple(r.tolist()) for r in together}) == 3


@pytest.mark.parametrize("at_a_time", [1, 100, 151])
def test_many_positions_are_drawn_part_by_part(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    keys, sampling = torch.arange(13) % 4, Sampling(0.8, top_p=0.9)
    logits = torch.randn(13, 50, generator=torch.Generator().manual_seed(0))
    whole = sampling.choose(logits, keys, torch.arange(13))
    monkeypatch.setattr("jf_cluster.jacobi.sampling.LOGITS_AT_A_TIME", at_a_time)
    assert torch.equal(sampling.choose(logits, keys, torch.arange(13)), whole)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.arange(400), torch.arange(400), 500).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # standard error 0.003
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, 4)
    keys = torch.arange(20_000)
    for temperature in (0.5, 1.0, 2.0):
        chosen = Sampling(temperature).choose(logits, keys, torch.zeros_like(keys))
        shares = torch.bincount(chosen, minlength=4) / 20_000
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=0.02, rtol=0)


def test_filters_keep_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(2000, 4)
    keys = torch.arange(2000)
    zeros = torch.zeros_like(keys)
    assert set(Sampling(1.0, top_k=2).choose(logits, keys, zeros).tolist()) == {0, 1}
    assert set(Sampling(1.0, top_p=0.79).choose(logits, keys, zeros).tolist()) == {0, 1}
    assert set(Sampling(1.0, top_p=0.81).choose(logits, keys, zeros).tolist()) == {0, 1, 2}
    assert set(Sampling(1.0, top_p=1e-9).choose(logits, keys, zeros).tolist()) == {0}


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**bad)  # type: ignore[arg-type]
