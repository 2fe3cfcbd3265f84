"""The ranks' common work: every one does its part once, all get the same, and nobody waits for one that gave up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pytest
import torch
from numpy.typing import NDArray

from jf_cluster.config import Config
from jf_cluster.train.batches import BatchSource
from jf_cluster.train.plan import TrainingPlan
from jf_cluster.train.sharing import Work
from jf_cluster.train.worker import run_rank
from tests.train.conftest import Ranks, at_step, job_of, losses, provenance, seal, weights, write
from trajectory_store import ArrivingRows, CorruptShardError, SealedRows, StoreError, TrajectoryStore
from trajectory_store.order import global_order
from trajectory_store.rows import sorted_ids


def joined(use: Callable[..., Any], *arguments: Any) -> Any:
    """What ``use`` gives on a rank that has joined the others and can share work with them."""
    import torch.distributed as dist

    from jf_cluster.train.sharing import Sharing

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ["JF_INIT_METHOD"], rank=rank, world_size=world_size)
    try:
        return use(rank, Sharing(rank, world_size), *arguments)
    finally:
        dist.destroy_process_group()


def squares(rank: int, share: Callable[[int, Work], NDArray[np.int64]]) -> Any:
    """Two pieces of work that go well, between them one that fails on rank 1 for a reason of its own."""
    asked: list[int] = []

    def work(part: slice) -> NDArray[np.int64]:
        asked.extend(range(*part.indices(5)))
        return np.arange(5)[part] ** 2

    def damaged(part: slice) -> NDArray[np.int64]:
        if rank == 1:
            raise CorruptShardError("shard-a is damaged")
        return np.arange(5)[part]

    def refused(part: slice) -> NDArray[np.int64]:
        if rank == 0:
            raise KeyError("x")
        return np.arange(5)[part]

    found, said = [share(5, work).tolist()], []
    for failing in (damaged, refused):
        try:
            share(5, failing)
        except (StoreError, KeyError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    found.append(share(5, work).tolist())
    return asked, found, said


def test_each_rank_does_its_part_and_all_know_all(ranks: Ranks) -> None:
    (first, found, said), (second, others, told) = ranks.call(joined, 2, squares)
    assert (first, second) == ([0, 2, 4] * 2, [1, 3] * 2)
    assert found == others == [[0, 1, 4, 9, 16]] * 2
    assert said == ["CorruptShardError: shard-a is damaged", "KeyError: 'x'"]
    assert told == ["CorruptShardError: shard-a is damaged", "RuntimeError: KeyError: 'x'"]


def planned_until_given_up(rank: int, share: Any, config_json: str, prompt_ids: list[str]) -> tuple[bool, str]:
    """Rank 1 knows of rows that will never come; both plan in a thread until they are to stop."""
    import torch.distributed as dist

    config = Config.model_validate_json(config_json)
    both_waited = dist.new_group()  # of this thread's own
    round_ = TrajectoryStore(config.store_url).round(1)
    rows = ArrivingRows(round_, [*prompt_ids, "prompt-9999"][: len(prompt_ids) + rank], poll_s=0.05)
    source = BatchSource(rows, config, 1, torch.device("cpu"), share)
    said: list[str] = []

    def plan() -> None:
        try:
            source.lengths(0, np.arange(len(prompt_ids) + rank)[-len(prompt_ids) :])
        except StoreError as error:
            said.append(type(error).__name__)

    thread = threading.Thread(target=plan)
    thread.start()
    thread.join(0.5)
    waited = thread.is_alive()
    dist.barrier(both_waited)
    rows.give_up()
    thread.join(60)
    return waited, said[0]


def test_a_rank_that_gives_up_its_wait_does_not_keep_the_others(
    configured: Callable[..., Config], ranks: Ranks
) -> None:
    config = configured()
    seal(config)
    (Path(config.store_url) / "round-001" / "manifest.json").unlink()
    prompt_ids = [f"prompt-{number:04d}" for number in range(24)]
    given = ranks.call(joined, 2, planned_until_given_up, config.model_dump_json(), prompt_ids)
    assert given == [(True, "WaitInterruptedError")] * 2


def test_ranks_that_wait_for_rows_stop_together_and_go_on(
    configured: Callable[..., Config], ranks: Ranks, tmp_path: Path
) -> None:
    """Half of the round is there: they take some steps, wait, are asked to stop, and later end as if all had been."""
    config = configured(packing_rows=6)
    seal(config)
    whole = job_of(config, tmp_path / "whole")
    ranks.train(whole, 2)

    half = config.model_copy(update={"store": str(tmp_path / "half")})
    prompt_ids = sorted_ids(f"prompt-{number:04d}" for number in range(24))
    first = {prompt_ids[int(row)].as_py() for row in global_order(24, config.seed, 0)[:15]}
    write(half, only=first)
    feather.write_feather(pa.table({"prompt_id": prompt_ids}), str(tmp_path / "ids.arrow"), compression="uncompressed")
    job = replace(job_of(half, tmp_path / "job"), prompt_ids=str(tmp_path / "ids.arrow"))
    with at_step(Path(job.steps_log), 1, Path(job.stop).touch):
        ranks.call(run_rank, 2, job)
    done = len(losses(job))
    assert 1 <= done < 6 and not Path(job.export).exists()

    Path(job.stop).unlink()
    write(half)
    TrajectoryStore(half.store_url).round(1).seal(provenance(half))
    ranks.train(job, 2)
    assert losses(job) == losses(whole)
    assert all(torch.equal(weight, weights(job)[name]) for name, weight in weights(whole).items())


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_plan_is_the_same_and_a_rank_reads_its_part_of_the_rows(
    configured: Callable[..., Config], world_size: int
) -> None:
    config = configured()
    seal(config, count=50)
    reads: list[list[int]] = []

    class Counted(SealedRows):
        def __getitem__(self, row: int) -> Any:
            reads[-1].append(row)
            return super().__getitem__(row)

    def one_after_the_other(count: int, work: Work) -> NDArray[np.int64]:
        together = np.zeros(count, np.int64)
        for rank in range(world_size):
            reads.append([])
            part = slice(rank, count, world_size)
            together[part] = work(part)
        return together

    def steps(source: BatchSource) -> Any:
        plan = TrainingPlan(50, source.lengths, 1, 200, micro_batches_per_step=4, window=20)
        return [plan.step(step) for step in range(12)]

    rows = Counted(TrajectoryStore(config.store_url).round(1))
    reads.append([])
    whole = steps(BatchSource(rows, config, 1, torch.device("cpu")))
    reads.clear()
    assert steps(BatchSource(rows, config, 1, torch.device("cpu"), one_after_the_other)) == whole
    assert max(map(len, reads)) == -(-20 // world_size)
    assert sorted(row for part in reads[: 3 * world_size] for row in part) == list(range(50))
