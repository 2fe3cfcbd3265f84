"""What is kept of a training on the way: checkpoints when they are due, and a way back when a step would spoil it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from jf_cluster.config import Config
from jf_cluster.train.checkpoints import Checkpoint, best, kept, whole_checkpoints
from jf_cluster.train.guard import FEW_NORMS, Guard, Skip, read_skips, record_skip
from jf_cluster.train.worker import RankJob
from tests.train.conftest import Ranks, job_of, losses, rewind, seal, weights


def steps_kept(job: RankJob) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(Path(job.checkpoints))]


def same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal bit by bit; what is not a number is so in both."""
    return mine.keys() == other.keys() and all(
        torch.equal(mine[n].view(torch.uint8), other[n].view(torch.uint8)) for n in mine
    )


def test_the_last_checkpoints_and_the_best_are_kept() -> None:
    made = [Checkpoint(step, 2, "", loss) for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 4.0))]
    assert best(made).step == 3
    assert {c.step for c in kept(made, 2)} == {3, 4, 5}
    assert {c.step for c in kept(made[:3], 2)} == {2, 3}


def test_the_best_checkpoint_is_kept_and_published_if_wished(
    configured: Callable[..., Config], ranks: Ranks, tmp_path: Path
) -> None:
    # The first steps teach something, the high rate afterwards throws it away again.
    config = configured(
        steps=8, learning_rate=0.15, warmup_steps=7, checkpoint_every_steps=1, keep_checkpoints=2, export="best"
    )
    seal(config)
    job = job_of(config, tmp_path / "job")
    assert ranks.train(job, 2) == 2, "once for the steps, once for the export of the best checkpoint"
    by_loss = min(losses(job), key=lambda step: step[1])[0]
    assert by_loss < 7 and steps_kept(job) == [by_loss, 7, 8]
    held = get_fp32_state_dict_from_zero_checkpoint(job.checkpoints, tag=f"step-{by_loss:06d}")
    for name, weight in weights(job).items():
        assert torch.equal(weight, held[f"model.{name}"]), name


def test_checkpoints_at_intervals_of_time(configured: Callable[..., Config], ranks: Ranks, tmp_path: Path) -> None:
    config = configured(checkpoint_every_steps=100, checkpoint_every_s=1e-9, keep_checkpoints=5)
    seal(config)
    job = job_of(config, tmp_path / "job")
    ranks.train(job, 2)
    assert steps_kept(job) == [2, 3, 4, 5, 6]
    rarely = job_of(configured(checkpoint_every_steps=100, checkpoint_every_s=1e9), tmp_path / "rarely")
    ranks.train(rarely, 2)
    assert steps_kept(rarely) == [6]
    assert same(weights(job), weights(rarely))


def test_checkpoints_written_beside_the_training_are_as_good(
    sealed: Config, configured: Callable[..., Config], ranks: Ranks, tmp_path: Path
) -> None:
    whole, beside = job_of(sealed, tmp_path / "whole"), job_of(configured(checkpoint_async=True), tmp_path / "beside")
    ranks.train(whole, 2)
    ranks.train(beside, 2)
    assert losses(beside) == losses(whole) and steps_kept(beside) == steps_kept(whole)
    resumed = rewind(beside, tmp_path / "resumed", to_step=4)
    ranks.train(resumed, 2)
    assert losses(resumed) == losses(whole) and same(weights(resumed), weights(whole))


def test_a_stop_saves_and_the_same_job_goes_on(sealed: Config, ranks: Ranks, tmp_path: Path) -> None:
    whole, stopped = job_of(sealed, tmp_path / "whole"), job_of(sealed, tmp_path / "stopped")
    ranks.train(whole, 2)
    for step in (1, 2, 3):
        Path(stopped.stop).touch()
        ranks.train(stopped, 2)
        assert steps_kept(stopped)[-1] == step and not Path(stopped.export).exists()
    Path(stopped.stop).unlink()
    ranks.train(stopped, 2)
    assert losses(stopped) == losses(whole) and same(weights(stopped), weights(whole))


def test_spoilt_data_are_left_out_as_if_they_had_never_been_there(
    configured: Callable[..., Config], broken_base: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Two prompts make their loss not a number, one before and one after the first checkpoint.

    The reference is told of them from the start, so its plan never has them.
    """
    config = configured(model=broken_base, steps=10)
    seal(config, broken=(2, 3))
    job = job_of(config, tmp_path / "job")
    assert ranks.train(job, 2) == 3
    skips = read_skips(Path(job.skips), job.identity)
    assert [{"prompt-0002", "prompt-0003"} & set(skip.prompt_ids) for skip in skips] == [
        {"prompt-0003"},
        {"prompt-0002"},
    ]
    assert all("nan" in skip.reason and 0 < len(skip.rows) < 12 for skip in skips)
    assert skips[0].step < 2 <= skips[1].step, "one goes back to the start model, one to a checkpoint"
    assert [step for step, *_ in losses(job)] == list(range(1, 11))

    never = job_of(config, tmp_path / "never")
    shutil.copyfile(job.skips, never.skips)
    assert ranks.train(never, 2) == 1
    assert losses(never) == losses(job) and same(weights(never), weights(job))

    elsewhere = replace(
        never, identity="another", **{n: str(tmp_path / n) for n in ("checkpoints", "steps_log", "export")}
    )
    assert ranks.train(elsewhere, 2) > 1, "another training does not take over what this one left out"


def test_an_exploding_gradient_is_noticed() -> None:
    usual = [1.0, 30.0, 2.0, 1.5] * 5
    guard = Guard(norm_factor=20)
    assert [guard.trouble(1.0, norm) for norm in usual] == [None] * 20, "spikes below the factor are usual"
    assert guard.trouble(1.0, 36.0) == "gradient norm 36, usually 1.75"
    assert guard.trouble(1.0, 34.0) is None
    resumed = Guard(20, [*usual, 34.0])
    assert resumed.trouble(1.0, 41.0) == "gradient norm 41, usually 2"
    assert Guard(20, usual[: FEW_NORMS - 1]).trouble(1.0, 1e9) is None, "nothing is unusual at the beginning"
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        assert Guard(20).trouble(loss, norm) == f"loss {loss}, gradient norm {norm}"


def test_an_exploding_gradient_leaves_the_whole_step_out(
    configured: Callable[..., Config], ranks: Ranks, tmp_path: Path
) -> None:
    """No single micro-batch is to blame for a norm. The factor is so low that a usual step counts as an explosion."""
    config = configured(steps=14, learning_rate=3e-3, guard={"norm_factor": 1.08})
    seal(config)
    job = job_of(config, tmp_path / "job")
    starts = ranks.train(job, 2)
    skips = read_skips(Path(job.skips), job.identity)
    assert starts == len(skips) + 1 > 1
    assert all(skip.step >= FEW_NORMS and "usually" in skip.reason for skip in skips)
    norms = [norm for *_, norm in losses(job)]
    assert all(
        norm <= 1.08 * torch.tensor(norms[:i]).quantile(0.5).item() for i, norm in enumerate(norms) if i >= FEW_NORMS
    )


def test_the_record_is_read_back_and_half_a_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    assert read_skips(path, "a") == []
    first, second = Skip("a", 3, "loss nan", (1, 2), ("p1", "p2")), Skip("b", 4, "loss nan", (5,), ("p5",))
    record_skip(path, first)
    record_skip(path, second)
    with path.open("a") as stream:
        stream.write('{"identity": "a", "st')
    assert read_skips(path, "a") == [first] and read_skips(path, "b") == [second]
    third = replace(first, step=5)
    record_skip(path, third)
    assert read_skips(path, "a") == [first, third] and read_skips(path, "b") == [second]
