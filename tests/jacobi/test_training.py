"""Noise, samples, packing and loss: what a training step sees and what it is taught."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate, pack
from jf_cluster.jacobi.samples import Noise, Sample, build_sample, sample_length
from jf_cluster.jacobi.trajectories import trace
from trajectory_store import Trajectory

from .conftest import END, oracle_responses, random_prompts

BLOCK = 8


@pytest.fixture(scope="module")
def trajectories(qwen2: PreTrainedModel) -> list[Trajectory]:
    prompts = random_prompts([5, 9, 1, 14])
    responses = [np.array(r, dtype=np.int32) for r in oracle_responses(qwen2, prompts, 37)]
    traces = trace(qwen2, prompts, responses, block_size=BLOCK, keys=range(4))
    return [
        Trajectory(str(i), p.astype(np.int32), r, r[-1] == END, t.iterations, t.accepted, t.tails)
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]


def samples(trajectories: list[Trajectory], noise: Noise, seed: int = 5) -> list[Sample]:
    return [build_sample(t, BLOCK, noise, np.random.default_rng(seed + i)) for i, t in enumerate(trajectories)]


def test_schedules() -> None:
    random = np.random.default_rng(0)
    assert Noise(t_min=0.2, t_max=0.8).targets(4, random).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Noise("reverse", 0.2, 0.8).targets(4, random).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert Noise("constant", 0.2, 0.8).targets(3, random).tolist() == [0.8] * 3
    drawn = Noise("random", 0.2, 0.8).targets(1000, random)
    assert drawn.min() >= 0.2 and drawn.max() <= 0.8 and drawn.std() > 0.1


@pytest.mark.parametrize("window", [0, 1, 2, 16])
@pytest.mark.parametrize("schedule", ["progressive", "reverse", "random", "constant"])
def test_branches_show_stored_iterates_and_teach_from_the_first_divergence(
    trajectories: list[Trajectory], schedule: str, window: int
) -> None:
    for t, s in zip(trajectories, samples(trajectories, Noise(schedule, window=window, draws=2)), strict=True):
        response, prompt = t.response.tolist(), len(t.prompt)
        assert s.stem.tolist() == [*t.prompt.tolist(), *response]
        for b in s.branches:
            assert b.taught[0] and b.taught[-1]
            assert b.start + len(b.tokens) < len(s.stem)
            # The branch starts at its first divergence from the clean stream.
            assert b.tokens[0] != s.stem[b.start]
            for i, (token, taught) in enumerate(zip(b.tokens.tolist(), b.taught.tolist(), strict=True)):
                block, place = divmod(b.start - prompt + i, BLOCK)
                iterates = [t.iterate(block, k, BLOCK).tolist() for k in range(int(t.iterations[block]) + 1)]
                assert token in [iterate[place] for iterate in iterates]
                if not taught:
                    assert token == s.stem[b.start + i]
        if window == 1:
            assert all(len(b.tokens) <= BLOCK for b in s.branches)


def test_the_nearest_iterate_is_chosen(trajectories: list[Trajectory]) -> None:
    for t in trajectories:
        s = build_sample(t, BLOCK, Noise("constant", 1.0, 1.0, window=1), np.random.default_rng(0))
        worst = sum(int(k > 0) for k in t.iterations)
        # Ratio 1 is nearest to the initial guess of every block that did not start at its fixed point; a block whose
        # only divergence is the response's last token has nothing to teach.
        assert len(s.branches) in (worst, worst - 1)
        for b in s.branches:
            block, place = divmod(b.start - len(t.prompt), BLOCK)
            assert b.tokens.tolist() == t.iterate(block, 0, BLOCK).tolist()[place : place + len(b.tokens)]


def test_samples_repeat_with_the_generator(trajectories: list[Trajectory]) -> None:
    noise = Noise("random", window=2, draws=3)
    first, again, other = (samples(trajectories, noise, seed) for seed in (1, 1, 2))
    assert str(first) == str(again)
    assert str(first) != str(other)


def plain_loss(model: PreTrainedModel, batch: list[Sample], ar_weight: float) -> tuple[torch.Tensor, float, float]:
    """The loss written out: one ordinary forward a stem and a branch, one position at a time."""
    consistency, ar, noisy, clean = torch.zeros(()), torch.zeros(()), 0, 0
    for s in batch:
        stem = model(input_ids=torch.from_numpy(s.stem)[None]).logits[0].log_softmax(-1)
        for p in range(s.prompt_length - 1, len(s.stem) - 1):
            ar, clean = ar - stem[p, s.stem[p + 1]], clean + 1
        for b in s.branches:
            sequence = torch.from_numpy(np.concatenate([s.stem[: b.start], b.tokens]))[None]
            student = model(input_ids=sequence).logits[0].log_softmax(-1)
            for p in b.start + np.flatnonzero(b.taught):
                teacher = stem[p].detach()
                consistency, noisy = consistency + (teacher.exp() * (teacher - student[p])).sum(), noisy + 1
    return consistency / noisy + ar_weight * ar / clean, consistency.item(), ar.item()


@pytest.mark.parametrize("chunk_tokens", [10_000, 50, 3])
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_loss_and_gradient_equal_the_plain_form(
    model: PreTrainedModel, trajectories: list[Trajectory], backend: str, chunk_tokens: int
) -> None:
    batch = samples(trajectories, Noise(window=2, draws=2))
    model.zero_grad()
    expected, consistency, ar = plain_loss(model, batch, 10.0)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with branch_attention(model, backend):
        loss = forcing_loss(model, collate(batch), chunk_tokens=chunk_tokens)
        loss.total(10.0).backward()
    # float32 sums over a few hundred positions in another order.
    assert loss.consistency_sum.item() == pytest.approx(consistency, rel=1e-4)
    assert loss.ar_sum.item() == pytest.approx(ar, rel=1e-4)
    assert loss.bucket_sums.sum().item() == pytest.approx(consistency, rel=1e-4)
    assert int(loss.bucket_tokens.sum()) == loss.consistency_tokens
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=2e-4, rtol=2e-3)


def test_micro_batches_add_up(qwen2: PreTrainedModel, trajectories: list[Trajectory]) -> None:
    batch = samples(trajectories, Noise(window=2))
    with branch_attention(qwen2), torch.no_grad():
        whole = forcing_loss(qwen2, collate(batch))
        parts = [forcing_loss(qwen2, collate([s])) for s in batch]
    assert sum(p.consistency_sum.item() for p in parts) == pytest.approx(whole.consistency_sum.item(), rel=1e-4)
    assert sum(p.ar_sum.item() for p in parts) == pytest.approx(whole.ar_sum.item(), rel=1e-4)
    assert sum(p.ar_tokens for p in parts) == whole.ar_tokens


def test_a_sample_without_noise_teaches_the_response_alone(qwen2: PreTrainedModel) -> None:
    none = np.zeros(0, dtype=np.int32)
    t = Trajectory("x", np.array([1, 2], np.int32), np.array([4], np.int32), False, np.array([0], np.int32), none, none)
    sample = build_sample(t, BLOCK, Noise(), np.random.default_rng(0))
    assert sample.branches == ()
    with branch_attention(qwen2):
        loss = forcing_loss(qwen2, collate([sample]))
    assert loss.consistency_tokens == 0 and loss.ar_tokens == 1 and loss.total(10.0).item() > 0


def test_packing_cuts_no_sample_and_wastes_little() -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5.0, 0.6, size=3000), 4000).astype(int).tolist()
    bins = pack(lengths, 4096)
    assert sorted(i for b in bins for i in b) == list(range(3000))
    assert all(sum(lengths[i] for i in b) <= 4096 for b in bins)
    assert 1 - sum(lengths) / (4096 * len(bins)) < 0.05
    assert bins == pack(lengths, 4096)


def test_a_sample_over_the_budget_has_a_micro_batch_to_itself() -> None:
    assert pack([10, 5000, 20], 4096) == [[0, 2], [1]]


@pytest.mark.parametrize("noise", [Noise(window=1), Noise("random", window=2, draws=3), Noise(window=0)], ids=str)
def test_a_samples_length_is_known_before_it_is_built(trajectories: list[Trajectory], noise: Noise) -> None:
    built = [s.length for s in samples(trajectories, noise)]
    ahead = [sample_length(t, BLOCK, noise, np.random.default_rng(5 + i)) for i, t in enumerate(trajectories)]
    assert ahead == built
