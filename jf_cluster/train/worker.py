"""What every rank does: join, build the engine, resume, step through the plan, save, export.

Runs inside Ray Train's worker processes. It trusts what the driver checked (start model, data, settings) and reports
through the log of steps. Ranks that return without an export wrote down why: the record of skips has a new line, or
there was a request to stop.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jf_cluster.config import Config
from jf_cluster.train.guard import NORMS, Guard, Skip, read_skips, record_skip
from jf_cluster.train.steps_log import StepRecord, StepsLog, read_steps
from jf_cluster.whole_files import named_when_full

if TYPE_CHECKING:
    from concurrent.futures import Future

    from deepspeed import DeepSpeedEngine

    from jf_cluster.train.batches import PlannedStep
    from jf_cluster.train.checkpoints import Checkpoint
    from jf_cluster.train.engine import Group
    from jf_cluster.train.step import StepResult
    from trajectory_store import Rows

logger = logging.getLogger(__name__)

WAIT_S = 0.2
"""Time between the ranks' looks at whether trajectories that are still collected are there."""


@dataclass(frozen=True)
class RankJob:
    """What the driver gives to every rank; paths are on storage that all nodes share."""

    config_json: str
    round_number: int
    identity: str
    checkpoints: str
    steps_log: str
    skips: str
    stop: str
    """A file that asks the ranks to save and return after the step they are in."""
    export: str
    prompt_ids: str | None = None
    """A file with the ids of the round's prompts, where the round may still be written; without it, it is sealed."""


@dataclass(frozen=True)
class Start:
    """Where a training goes on from."""

    checkpoint: Checkpoint | None
    skips: list[Skip]
    done: list[StepRecord]
    """The last steps before it."""
    finished: bool
    """Nothing is left but to export the checkpoint."""

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def train_rank(fields: dict[str, Any]) -> None:
    """Ray Train's entry into a rank; ``fields`` are those of :class:`RankJob`."""
    run_rank(RankJob(**fields))


def run_rank(job: RankJob) -> None:
    """Train ``job`` from its last whole checkpoint to the end and export; all ranks call this together.

    Raises:
        CheckpointError: the last checkpoint belongs to another training, or cannot be read.
        OSError: the disk is full; names what found no room.
    """
    begun = time.perf_counter()
    config = Config.model_validate_json(job.config_json)
    warnings.filterwarnings("ignore", category=FutureWarning)  # several lines per step from DeepSpeed's torch calls
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.train.gpus_per_worker > 0 else "cpu")
    # Late: importing DeepSpeed fixes the accelerator, and takes seconds that only ranks should pay.
    import torch

    from jf_cluster.jacobi.attention import branch_attention
    from jf_cluster.train import checkpoints, engine, export

    group = engine.join_group(config)
    try:
        start = _start(job, config, group)
        universal = start.checkpoint is not None and start.checkpoint.world_size != group.world_size
        ranks = engine.build_engine(config, job.round_number, group, load_universal=universal)
        if start.checkpoint is not None:
            checkpoints.load(ranks, Path(job.checkpoints), start.checkpoint)
        if group.rank == 0:
            seconds = time.perf_counter() - begun
            logger.info("ranks ready after %.1f s, %d of %d steps done", seconds, start.step, config.train.steps)
        model = ranks.module.model
        export.check_exportable(model)  # before hours of training
        with branch_attention(model, config.model.attention), named_when_full(Path(job.checkpoints)):
            exports = start.finished or _steps(job, config, group, ranks, start)
        if exports:
            with named_when_full(Path(job.export)):
                export.export_model(model, Path(job.export), getattr(torch, config.model.dtype), config.model.base)
    finally:
        engine.leave_group()


def _start(job: RankJob, config: Config, group: Group) -> Start:
    """Where to go on, as rank 0 finds it."""
    from jf_cluster.train import checkpoints

    found: Start | checkpoints.CheckpointError | None = None
    if group.rank == 0:
        try:
            checkpoint, finished = checkpoints.to_load(Path(job.checkpoints), job.identity, config.train)
            last = checkpoint.step if checkpoint else 0
            done = [record for record in read_steps(Path(job.steps_log)) if record.step <= last]
            tail = done[-max(NORMS, config.train.checkpoint_every_steps) :]
            found = Start(checkpoint, read_skips(Path(job.skips), job.identity), tail, finished)
        except checkpoints.CheckpointError as error:  # the other ranks must not wait for ever
            found = error
    start = group.from_first(found)
    if isinstance(start, checkpoints.CheckpointError):
        raise start
    return start


def _steps(job: RankJob, config: Config, group: Group, ranks: DeepSpeedEngine, start: Start) -> bool:
    """Optimizer steps from ``start`` on, logged by rank 0 and saved by all; whether the weights are to be exported."""
    from jf_cluster.train import checkpoints
    from jf_cluster.train.batches import BatchSource
    from jf_cluster.train.engine import seed_torch
    from jf_cluster.train.plan import TrainingPlan
    from jf_cluster.train.sharing import Sharing, alone
    from jf_cluster.train.step import peak_memory_bytes, train_step

    train = config.train.of_round(job.round_number)
    rows = _rows(job, config)
    share = Sharing(group.rank, group.world_size) if group.world_size > 1 else alone
    source = BatchSource(rows, config, job.round_number, group.device, share)
    plan = TrainingPlan(
        len(rows),
        source.lengths,
        config.seed,
        train.micro_batch_tokens,
        train.micro_batches_per_step,
        train.packing_rows,
        left_out=[(skip.step, skip.rows) for skip in start.skips],
    )
    guard = Guard(train.guard.norm_factor, [record.gradient_norm for record in start.done])
    losses = deque((record.loss for record in start.done), maxlen=train.checkpoint_every_steps)
    writer = checkpoints.CheckpointWriter(ranks, Path(job.checkpoints), train.keep_checkpoints)
    log = StepsLog(Path(job.steps_log), start.step) if group.rank == 0 else None
    done = saved = start.step
    stops = False
    begun = saved_at = time.perf_counter()

    def waits(batches: Future[PlannedStep]) -> bool:
        """Wait for a step's batches on all ranks, or for a request to stop, which all ranks follow together."""
        nonlocal stops
        there = job.prompt_ids is None
        while not (there or stops):
            asked = group.rank == 0 and Path(job.stop).exists()
            there, going = group.on_all(batches.done(), not asked)
            stops = not (there or going)
            if not (there or stops):
                time.sleep(WAIT_S)
        return there

    def save() -> None:
        nonlocal saved, saved_at
        loss = sum(losses) / len(losses)
        writer.save(checkpoints.Checkpoint(done, group.world_size, job.identity, loss))
        saved, saved_at = done, time.perf_counter()

    steps = source.steps(plan, start.step, train.steps, group.rank, group.world_size, waits)
    with closing(steps) as planned_steps:
        for planned in planned_steps:
            rate = float(ranks.optimizer.param_groups[0]["lr"])
            # Dropout, where a model has any, repeats after a restart.
            seed_torch(config.seed, planned.step)
            result = train_step(ranks, planned.batches, train.ar_weight)
            writer.settle()
            reason = guard.trouble(result.loss, result.gradient_norm)
            if reason:
                planned_steps.close()  # the rows are this thread's again
                _leave_out(job, group, rows, planned, result, reason)
                break
            done = planned.step + 1
            losses.append(result.loss)
            now = time.perf_counter()
            if log:
                log.append(_record(planned, result, rate, config, now - begun, peak_memory_bytes(group.device)))
            overdue = 0 < train.checkpoint_every_s <= now - saved_at
            stops, saves = group.from_first((Path(job.stop).exists(), overdue) if group.rank == 0 else None)
            if stops or saves or done % train.checkpoint_every_steps == 0 or done == train.steps:
                save()
            if stops:
                break
            begun = time.perf_counter()
    if stops and saved < done:
        save()
    writer.close()
    if log:
        log.close()
    return done == train.steps and not stops and _is_wanted(job, config, group)


def _rows(job: RankJob, config: Config) -> Rows:
    """The round's rows, sealed or to be waited for, behind those of the earlier rounds that are trained on again."""
    import pyarrow.feather as feather

    from trajectory_store import ArrivingRows, JoinedRows, SealedRows, TrajectoryStore

    store = TrajectoryStore(config.store_url)
    round_ = store.round(job.round_number)
    replayed = [SealedRows(store.round(r)) for r in config.train.replayed(job.round_number)]
    if job.prompt_ids is None:
        return JoinedRows([*replayed, SealedRows(round_)])
    prompt_ids = feather.read_table(job.prompt_ids, memory_map=True)["prompt_id"].chunk(0)  # written as one
    return JoinedRows([*replayed, ArrivingRows(round_, prompt_ids)])


def _is_wanted(job: RankJob, config: Config, group: Group) -> bool:
    """Whether the weights of the last step are the ones to publish; otherwise the ranks start again from the best."""
    from jf_cluster.train import checkpoints

    if config.train.export == "last":
        return True
    found = checkpoints.whole_checkpoints(Path(job.checkpoints)) if group.rank == 0 else None
    return group.from_first(found and checkpoints.best(found).step == config.train.steps)


def _leave_out(
    job: RankJob,
    group: Group,
    trajectories: Rows,
    planned: PlannedStep,
    result: StepResult,
    reason: str,
) -> None:
    """Record what spoilt a step: the micro-batches whose own loss is not finite, or all where only their sum tells."""
    import torch
    import torch.distributed as dist

    marks = torch.zeros(len(planned.micro_batches), device=group.device)
    marks[group.rank :: group.world_size] = torch.tensor(result.finite, device=group.device).logical_not().float()
    dist.all_reduce(marks)
    if group.rank == 0:
        marked = [m for m, mark in zip(planned.micro_batches, marks.tolist(), strict=True) if mark]
        rows = tuple(sorted({row for m in marked or planned.micro_batches for row in m.rows}))
        prompt_ids = tuple(trajectories[row].prompt_id for row in rows)
        record_skip(Path(job.skips), Skip(job.identity, planned.step, reason, rows, prompt_ids))
        logger.warning("step %d: %s; %d samples are left out from now on", planned.step + 1, reason, len(rows))


def _record(
    planned: PlannedStep, result: StepResult, rate: float, config: Config, seconds: float, peak_memory_bytes: int
) -> StepRecord:
    return StepRecord(
        step=planned.step + 1,
        epoch=planned.micro_batches[0].epoch,
        loss=result.loss,
        consistency=result.consistency,
        ar=result.ar,
        agreement=result.agreement,
        learning_rate=rate,
        gradient_norm=result.gradient_norm,
        tokens=result.tokens,
        fill=result.tokens / (config.train.micro_batch_tokens * config.train.micro_batches_per_step),
        seconds=seconds,
        consistency_by_ratio=result.consistency_by_ratio,
        peak_memory_bytes=peak_memory_bytes,
    )
