"""The plan is a pure function of lengths, seed and budget, and every world size shares the same steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from jf_cluster.config import Config
from jf_cluster.train.batches import BatchSource
from jf_cluster.train.plan import MicroBatch, TrainingPlan
from tests.train.conftest import provenance, seal, trajectories
from trajectory_store import JoinedRows, SealedRows, Trajectory, TrajectoryStore

LENGTHS = np.random.default_rng(0).integers(10, 100, 57)


def lengths(epoch: int, rows: np.ndarray) -> np.ndarray:
    return LENGTHS[rows] + epoch % 2


def plan(seed: int = 1, per_step: int = 4, window: int = 16) -> TrainingPlan:
    return TrainingPlan(len(LENGTHS), lengths, seed, token_budget=200, micro_batches_per_step=per_step, window=window)


def test_the_same_inputs_give_the_same_steps_in_whatever_order_they_are_asked_for() -> None:
    forward = [plan().step(s) for s in range(20)]
    one = plan()
    assert [one.step(s) for s in reversed(range(20))] == forward[::-1]
    assert [one.step(s) for s in (7, 19, 3)] == [forward[s] for s in (7, 19, 3)]
    assert [plan(seed=2).step(s) for s in range(20)] != forward


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_without_loss_or_overlap(world_size: int) -> None:
    for step in range(10):
        shares = [plan().share(step, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        together = [micro_batch for share in shares for micro_batch in share]
        assert sorted(together, key=lambda m: m.rows) == sorted(plan().step(step), key=lambda m: m.rows)


def test_a_world_size_that_does_not_divide_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="4 micro-batches per step cannot be shared by 3 ranks"):
        plan().share(0, 0, 3)


def test_every_epoch_has_every_row_once_within_the_budget() -> None:
    micro_batches = [m for step in range(60) for m in plan().step(step)]
    for epoch in range(micro_batches[-1].epoch):  # the last one is cut
        of_epoch = [m for m in micro_batches if m.epoch == epoch]
        assert sorted(row for m in of_epoch for row in m.rows) == list(range(len(LENGTHS)))
        assert all(lengths(epoch, np.array(m.rows)).sum() <= 200 for m in of_epoch)
    first, second = ([m.rows for m in micro_batches if m.epoch == epoch] for epoch in (0, 1))
    assert first != second


def test_rows_are_left_out_from_a_step_on_and_what_is_before_it_stays() -> None:
    whole = [m for step in range(60) for m in plan().step(step)]
    first, second = set(whole[4 * 7 + 2].rows), {whole[0].rows[0], whole[4 * 30].rows[0]}
    without = TrainingPlan(len(LENGTHS), lengths, 1, 200, 4, window=16, left_out=[(7, first), (9, second)])
    expected: list[MicroBatch] = []
    for micro_batch in whole:
        step = len(expected) // 4
        gone = (first if step >= 7 else set()) | (second if step >= 9 else set())
        if rows := tuple(row for row in micro_batch.rows if row not in gone):
            expected.append(MicroBatch(micro_batch.epoch, rows))
    assert expected[:28] == whole[:28] and len(whole) - 10 < len(expected) < len(whole)
    steps = len(expected) // 4
    assert [m for step in range(steps) for m in without.step(step)] == expected[: 4 * steps]
    assert without.step(6) == plan().step(6), "going back gives the same again"
    assert not {row for step in range(9, 60) for m in without.step(step) for row in m.rows} & (first | second)
    with pytest.raises(ValueError, match="not left out"):
        TrainingPlan(3, lengths, 1, 200, 4, left_out=[(0, (0, 1)), (5, (1, 2))])


def test_lengths_are_asked_for_a_few_times_a_step_however_large_it_is() -> None:
    """And never for more rows than the step needs, but for the rest of its last window: they may not be there yet."""
    many = np.random.default_rng(0).integers(10, 100, 4000)
    for per_step in (1, 8, 64, 512):
        asked: list[int] = []

        def counted(epoch: int, rows: np.ndarray, asked: list[int] = asked) -> np.ndarray:
            asked.append(len(rows))
            return many[rows]

        one = TrainingPlan(len(many), counted, 1, token_budget=200, micro_batches_per_step=per_step, window=16)
        for step in range(2):
            del asked[:]
            before = len(one._drawn) - step * per_step
            drawn = sum(len(m.rows) for m in one.step(step))
            assert len(asked) <= 6 and sum(asked) <= drawn + 16 and (step or before == 0)


def test_a_long_run_keeps_only_a_few_windows_in_memory() -> None:
    one = plan(window=4)
    for step in range(500):
        one.step(step)
    assert len(one._drawn) < 8 * 4 + 8
    assert one.step(499) == plan(window=4).step(499)
    assert one.step(0) == plan(window=4).step(0)


def test_the_plan_fills_its_micro_batches() -> None:
    """Lengths as problems' solutions have them: padding under 5%, the last micro-batch of every window included."""
    mix = np.minimum(np.random.default_rng(1).lognormal(5.3, 0.3, 1600), 1500).astype(np.int64)
    full = TrainingPlan(len(mix), lambda epoch, rows: mix[rows], 0, token_budget=2560, micro_batches_per_step=2)
    steps = [full.step(s) for s in range(100)]
    tokens = sum(int(mix[list(m.rows)].sum()) for step in steps for m in step)
    assert tokens / (100 * 2 * 2560) > 0.95


def test_lengths_are_those_of_the_batches_built_later(configured: Callable[..., Config]) -> None:
    config = configured()
    config = config.model_copy(update={"noise": config.noise.model_copy(update={"schedule": "random"})})
    seal(config)
    reader = SealedRows(TrajectoryStore(config.store_url).round(1))
    source = BatchSource(reader, config, 1, torch.device("cpu"))
    rows = np.arange(len(reader))
    for epoch in (0, 1):
        built = [source.batch(MicroBatch(epoch, (row,))).total_tokens for row in rows.tolist()]
        assert source.lengths(epoch, rows).tolist() == built
    assert source.lengths(0, rows).tolist() != source.lengths(1, rows).tolist()


def test_an_empty_response_is_left_out_of_the_steps(configured: Callable[..., Config]) -> None:
    """This project writes none, but an imported round may hold one."""
    config = configured()
    nothing = np.zeros(0, dtype=np.int32)
    empty = Trajectory("a", np.array([5, 6], dtype=np.int32), nothing, False, nothing, nothing, nothing)
    round_ = TrajectoryStore(config.store_url).round(1)
    with round_.writer(provenance(config)) as writer:
        for trajectory in (empty, *trajectories(3)):
            writer.append(trajectory)
    round_.seal(provenance(config))
    rows = SealedRows(round_)
    lengths = BatchSource(rows, config, 1, torch.device("cpu")).lengths(0, np.arange(4))
    assert [length == 0 for length in lengths] == [rows[i].prompt_id == "a" for i in range(4)]


def test_samples_of_an_earlier_round_are_drawn_anew_in_a_later_one(configured: Callable[..., Config]) -> None:
    config = configured()
    seal(config)
    seal(config, 2, count=7, made_by="f" * 64)
    first, second = (SealedRows(TrajectoryStore(config.store_url).round(r)) for r in (1, 2))
    joined = BatchSource(JoinedRows([first, second]), config, 2, torch.device("cpu"))
    for row, alone, its_row in ((3, first, 3), (24 + 5, second, 5)):
        source = BatchSource(alone, config, 2, torch.device("cpu"))
        mine, other = joined.batch(MicroBatch(0, (row,))), source.batch(MicroBatch(0, (its_row,)))
        assert torch.equal(mine.tokens, other.tokens) and torch.equal(mine.targets, other.targets)
