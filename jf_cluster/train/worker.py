"""What every rank does: join, build the engine, resume, step through the plan, save, export.

Runs inside Ray Train's worker processes. It trusts what the driver checked (start model, data, settings) and reports
through the log of steps.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jf_cluster.config import Config
from jf_cluster.train.steps_log import StepRecord, StepsLog

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from jf_cluster.train.engine import Group

logger = logging.getLogger(__name__)


class NonFiniteStepError(RuntimeError):
    """A step whose loss or gradient is not a number; it is recorded and left out when the ranks start again."""


@dataclass(frozen=True)
class RankJob:
    """What the driver gives to every rank; paths are on storage that all nodes share."""

    config_json: str
    round_number: int
    identity: str
    checkpoints: str
    steps_log: str
    skipped_steps: str
    export: str


def train_rank(fields: dict[str, Any]) -> None:
    """Ray Train's entry into a rank; ``fields`` are those of :class:`RankJob`."""
    run_rank(RankJob(**fields))


def run_rank(job: RankJob) -> None:
    """Train ``job`` from its last whole checkpoint to the end and export; all ranks call this together.

    Raises:
        NonFiniteStepError: a step gave no finite numbers; the weights in memory are spoilt, the checkpoints are not.
        CheckpointError: the last checkpoint belongs to another training.
    """
    begun = time.perf_counter()
    config = Config.model_validate_json(job.config_json)
    warnings.filterwarnings("ignore", category=FutureWarning)  # several lines per step from DeepSpeed's torch calls
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.train.gpus_per_worker > 0 else "cpu")
    # Late: importing DeepSpeed fixes the accelerator, and takes seconds that only ranks should pay.
    import torch

    from jf_cluster.jacobi.attention import branch_attention
    from jf_cluster.train import engine, export

    group = engine.join_group(config)
    try:
        ranks, done = _start(job, config, group)
        if group.rank == 0:
            logger.info(
                "ranks ready after %.1f s, %d of %d steps done", time.perf_counter() - begun, done, config.train.steps
            )
        model = ranks.module.model
        with branch_attention(model, config.model.attention):
            _steps(job, config, group, ranks, done)
        export.export_model(model, Path(job.export), getattr(torch, config.model.dtype), config.model.base)
    finally:
        engine.leave_group()


def _start(job: RankJob, config: Config, group: Group) -> tuple[DeepSpeedEngine, int]:
    """The engine as of the last whole checkpoint, or fresh, and the number of steps it has done."""
    import torch.distributed as dist

    from jf_cluster.train import checkpoints, engine

    directory = Path(job.checkpoints)
    found = checkpoints.choose(directory, job.identity)
    universal = found is not None and found.world_size != group.world_size
    if found and universal and group.rank == 0:
        checkpoints.make_universal(directory, found)
    dist.barrier()
    ranks = engine.build_engine(config, job.round_number, group, load_universal=universal)
    if found is None:
        return ranks, 0
    checkpoints.load(ranks, directory, found)
    return ranks, found.step


def _steps(job: RankJob, config: Config, group: Group, ranks: DeepSpeedEngine, done: int) -> None:
    """Optimizer steps ``done`` to the last, logged by rank 0 and saved by all."""
    import torch

    from jf_cluster.train import checkpoints
    from jf_cluster.train.batches import BatchSource
    from jf_cluster.train.plan import TrainingPlan
    from jf_cluster.train.step import peak_memory_bytes, train_step
    from trajectory_store import TrajectoryStore

    train = config.train
    reader = TrajectoryStore(config.store_url).round(job.round_number).reader()
    source = BatchSource(reader, config, job.round_number, group.device)
    plan = TrainingPlan(
        len(reader), source.lengths, config.seed, train.micro_batch_tokens, train.micro_batches_per_step
    )
    skipped = read_skipped(Path(job.skipped_steps))
    log = StepsLog(Path(job.steps_log), done) if group.rank == 0 else None
    begun = time.perf_counter()
    for step, epoch, batches in source.steps(plan, done, train.steps, group.rank, group.world_size):
        rate = float(ranks.optimizer.param_groups[0]["lr"])
        if step in skipped:
            ranks.lr_scheduler.step()
        else:
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where a model has any, repeats after a restart
            result = train_step(ranks, batches, train.ar_weight)
            if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
                if group.rank == 0:
                    record_skipped(Path(job.skipped_steps), step, [row for m in plan.step(step) for row in m.rows])
                raise NonFiniteStepError(
                    f"step {step + 1}: loss {result.loss}, gradient norm {result.gradient_norm}; its samples are left "
                    f"out from now on ({job.skipped_steps})"
                )
            now = time.perf_counter()
            if log:
                fill = result.tokens / (train.micro_batch_tokens * train.micro_batches_per_step)
                log.append(
                    StepRecord(
                        step=step + 1,
                        epoch=epoch,
                        loss=result.loss,
                        consistency=result.consistency,
                        ar=result.ar,
                        agreement=result.agreement,
                        learning_rate=rate,
                        gradient_norm=result.gradient_norm,
                        tokens=result.tokens,
                        fill=fill,
                        seconds=now - begun,
                        consistency_by_ratio=result.consistency_by_ratio,
                        peak_memory_bytes=peak_memory_bytes(group.device),
                    )
                )
        if (step + 1) % train.checkpoint_every_steps == 0 or step + 1 == train.steps:
            state = checkpoints.Checkpoint(step + 1, group.world_size, job.identity)
            checkpoints.save(ranks, Path(job.checkpoints), state, train.keep_checkpoints)
        begun = time.perf_counter()
    if log:
        log.close()


def read_skipped(path: Path) -> set[int]:
    """Steps (from 0) left out because they gave no finite numbers."""
    return {json.loads(line)["step"] for line in path.read_text().splitlines()} if path.exists() else set()


def record_skipped(path: Path, step: int, rows: list[int]) -> None:
    """Remember a step to leave out, and the rows of the store it consists of."""
    with path.open("a") as stream:
        stream.write(json.dumps({"step": step, "rows": rows}) + "\n")
