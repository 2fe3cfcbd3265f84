"""The ranks under Ray Train: started together, and again from the last checkpoint when one dies and that can help.

Ray Train could restart them by itself. It would do so in silence, without end while a lost node is not replaced, and
also for what no restart mends: a full disk, a damaged shard.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from jf_cluster.config import Config
from jf_cluster.messages import first_line
from jf_cluster.models import ModelError
from jf_cluster.train.checkpoints import CheckpointError, drop_others, make_loadable, to_load, whole_checkpoints
from jf_cluster.train.rendezvous import RendezvousConfig
from jf_cluster.train.worker import RankJob, train_rank
from jf_cluster.whole_files import is_full
from trajectory_store import StoreError, StoreUnavailableError

logger = logging.getLogger(__name__)

NO_ROOM = (WorkerGroupStartupTimeoutError, WorkerGroupStartupFailedError)
"""A node is missing, or dies just now; or others hold it."""
POLL_S = 5.0
ROOM_WITHIN_S = 1800.0
"""How long a cluster that lost a node is given to replace it; Ray Train asks once a minute."""


class TrainingError(RuntimeError):
    """A round that cannot be trained; the message says why and what to do."""


def run_ranks(config: Config, job: RankJob, storage: Path) -> None:
    """Start the ranks until they return: with an export, a new line in the record of skips, or asked to stop.

    Raises:
        TrainingError: they failed more often than train.max_restarts without a newer checkpoint in between, for a
            reason that stays, or have no room.
    """
    restarts, reached, no_room_since = 0, _reached(job), None
    while not Path(job.stop).exists():  # asked to stop while there was nobody who could look
        try:
            _start(config, job, storage)
            return
        except CheckpointError as error:
            raise _to_be_mended(job, error) from error
        except ray.train.WorkerGroupError as error:
            no_room_since = None
            reason = _reason(error)
            if (lasting := _lasting(error)) is not None:
                _clear(job)
                raise _to_be_mended(job, lasting) from error
            if (now := _reached(job)) > reached:  # a long run meets many accidents, each of which may be the first
                restarts, reached = 0, now
            restarts += 1
            if restarts > config.train.max_restarts:
                raise TrainingError(
                    f"training round {job.round_number} failed after {config.train.max_restarts} restart(s) that came "
                    "to no newer checkpoint; the same command goes on from the last one once the cause is removed: "
                    f"{reason}"
                ) from error
            logger.warning(
                "a rank of round %d failed (%s): restart %d of %d from the last checkpoint",
                *(job.round_number, reason, restarts, config.train.max_restarts),
            )
        except ray.train.ControllerError as error:
            no_room_since = no_room_since or time.monotonic()
            if not isinstance(error.controller_failure, NO_ROOM):
                raise TrainingError(
                    f"training round {job.round_number} cannot start: {first_line(error.controller_failure)}"
                ) from error
            if time.monotonic() - no_room_since > ROOM_WITHIN_S:
                raise TrainingError(
                    f"training round {job.round_number} has found no room for {ROOM_WITHIN_S / 60:.0f} minutes "
                    f"({_resources(config)}): add nodes or lower train.workers; the same command goes on from the last "
                    "checkpoint"
                ) from error
            logger.warning(
                "the ranks of round %d find no room (%s); waiting for a node", job.round_number, _resources(config)
            )
            time.sleep(POLL_S)


def _to_be_mended(job: RankJob, cause: Exception) -> TrainingError:
    return TrainingError(
        f"training round {job.round_number} stopped: {cause}; the same command goes on from the last checkpoint once "
        "the cause is removed"
    )


def _reached(job: RankJob) -> int:
    """Step of the last whole checkpoint."""
    return max((checkpoint.step for checkpoint in whole_checkpoints(Path(job.checkpoints))), default=0)


def _start(config: Config, job: RankJob, storage: Path) -> None:
    train = config.train
    shutil.rmtree(storage, ignore_errors=True)  # Ray Train's own bookkeeping of an earlier start
    checkpoint, _ = to_load(Path(job.checkpoints), job.identity, train)
    make_loadable(Path(job.checkpoints), checkpoint, train.workers)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config=asdict(job),
        torch_config=RendezvousConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers, use_gpu=train.gpus_per_worker > 0, resources_per_worker=_of_a_rank(config)
        ),
        run_config=ray.train.RunConfig(
            name=f"round-{job.round_number:03d}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    trainer.fit()
    shutil.rmtree(storage, ignore_errors=True)


def _of_a_rank(config: Config) -> dict[str, float]:
    resources = {"CPU": config.train.cpus_per_worker}
    if config.train.gpus_per_worker > 0:
        resources["GPU"] = config.train.gpus_per_worker
    return resources


def _resources(config: Config) -> str:
    there, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{config.train.workers * each:g} {name}s needed, {free.get(name, 0.0):g} of {there.get(name, 0.0):g} free"
        for name, each in _of_a_rank(config).items()
    )


def _lasting(error: ray.train.WorkerGroupError) -> Exception | None:
    """The failure that the next start would meet again, if there is one."""
    for failure in error.worker_failures.values():
        if isinstance(failure, CheckpointError | ModelError) or is_full(failure):
            return failure
        if isinstance(failure, StoreError) and not isinstance(failure, StoreUnavailableError):
            return failure
    return None


def _clear(job: RankJob) -> None:
    """Remove what the ranks, which are gone, did not finish: on a full disk it would only be in the way."""
    checkpoints = Path(job.checkpoints)
    drop_others(checkpoints, whole_checkpoints(checkpoints))
    shutil.rmtree(job.export, ignore_errors=True)


def _reason(error: ray.train.WorkerGroupError) -> str:
    return "; ".join(f"rank {rank}: {first_line(failure)}" for rank, failure in sorted(error.worker_failures.items()))
