"""A round's training checkpoints: naming, completeness, choosing one to resume from, keeping the last few and the best.

A checkpoint is a directory ``step-000100`` of DeepSpeed files. It counts only when it holds ``complete.json``, which
is renamed into place after every rank has written its part; anything else is debris of a rank that died while
saving, ignored when resuming and swept at the next save. The directory is on storage that all ranks share.

DeepSpeed's files hold weights, optimizer and learning rate schedule. The rest of the training's state is its step: the
data position and every random draw are pure functions of it (`jf_cluster.train.plan`, `jf_cluster.train.batches`).
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch.distributed as dist

from jf_cluster.config import TrainConfig
from jf_cluster.messages import first_line
from jf_cluster.whole_files import write_whole
from trajectory_store.local_files import sync

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

_COMPLETE = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit what is being trained; the message says how to go on."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: optimizer steps done, ranks that wrote it, and the training it belongs to."""

    step: int
    world_size: int
    identity: str
    loss: float = math.inf
    """Mean over the last steps before it, as many as lie between two checkpoints."""

    @property
    def name(self) -> str:
        return f"step-{self.step:06d}"


def whole_checkpoints(directory: Path) -> list[Checkpoint]:
    """All complete checkpoints under ``directory``, oldest first."""
    return sorted(
        (Checkpoint(**json.loads(path.read_text())) for path in directory.glob(f"step-*/{_COMPLETE}")),
        key=lambda checkpoint: checkpoint.step,
    )


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The one with the lowest loss, of equals the last."""
    return min(reversed(checkpoints), key=lambda checkpoint: checkpoint.loss)


def kept(checkpoints: Sequence[Checkpoint], keep: int) -> set[Checkpoint]:
    """Of all whole checkpoints, oldest first, the last ``keep`` and the best."""
    return {*checkpoints[-keep:], best(checkpoints)}


def drop_others(directory: Path, keep: Collection[Checkpoint]) -> None:
    """Remove all checkpoints but ``keep``, and what never became one; for the only process that writes here."""
    names = {checkpoint.name for checkpoint in keep}
    for path in directory.iterdir():
        if path.is_dir() and path.name not in names:
            shutil.rmtree(path)


class CheckpointWriter:
    """Saves a training's checkpoints; all ranks call its methods together.

    Where DeepSpeed writes beside the training, a checkpoint becomes whole at the next :meth:`settle` only, which
    therefore has to follow every step: DeepSpeed waits for its writer before the weights change again.
    """

    def __init__(self, engine: DeepSpeedEngine, directory: Path, keep: int) -> None:
        self._engine, self._directory, self._keep = engine, directory, keep
        self._written: Checkpoint | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Have every rank write its part of ``checkpoint``."""
        self.settle()
        target = self._directory / checkpoint.name
        if self._engine.global_rank == 0 and target.exists():
            shutil.rmtree(target)  # debris of the same step; DeepSpeed would write between its files
        dist.barrier()
        self._engine.save_checkpoint(
            str(self._directory),
            tag=checkpoint.name,
            client_state={"step": checkpoint.step},
            save_latest=False,
            exclude_frozen_parameters=True,  # those of LoRA's base are in the model that training starts from
        )
        self._written = checkpoint
        if not self._engine.checkpoint_engine.is_decoupled():
            self.settle()

    def settle(self) -> None:
        """Make what was written a whole checkpoint, then drop those that are kept no longer and any debris."""
        if self._written is None:
            return
        if self._engine.checkpoint_engine.get_commit_info() is not None:  # no step came since: nobody has waited yet
            self._engine._commit_decoupled_checkpoint()
        checkpoint, self._written = self._written, None
        target = self._directory / checkpoint.name
        for part in target.glob(f"*zero_pp_rank_{self._engine.global_rank}_*"):
            sync(part)
        dist.barrier()
        if self._engine.global_rank != 0:
            return
        write_whole(target / _COMPLETE, json.dumps(asdict(checkpoint)))
        drop_others(self._directory, kept(whole_checkpoints(self._directory), self._keep))

    def close(self) -> None:
        """Settle and end DeepSpeed's writer process, if there is one."""
        self.settle()
        self._engine.checkpoint_engine.cleanup()


def choose(directory: Path, identity: str) -> Checkpoint | None:
    """The last whole checkpoint, if there is any.

    Raises:
        CheckpointError: it belongs to a training on other data, from another model or with other settings.
    """
    found = whole_checkpoints(directory)
    if not found:
        return None
    if found[-1].identity != identity:
        raise CheckpointError(
            f"the checkpoints in {directory} were made with other data, another start model or other training "
            "settings, so continuing from them would mix two trainings; restore those settings or delete the directory"
        )
    return found[-1]


def to_load(directory: Path, identity: str, train: TrainConfig) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to go on from, and whether all steps are done; then it is the one to be published.

    Raises:
        CheckpointError: as :func:`choose`.
    """
    last = choose(directory, identity)
    finished = last is not None and last.step == train.steps
    return (best(whole_checkpoints(directory)) if finished and train.export == "best" else last), finished


def load(engine: DeepSpeedEngine, directory: Path, checkpoint: Checkpoint) -> None:
    """Restore weights, optimizer and schedule on all ranks; ``engine`` was built for the right kind of checkpoint.

    Raises:
        CheckpointError: it cannot be read, as where a machine lost power while it was written.
    """
    universal = checkpoint.world_size != dist.get_world_size()
    tag = f"{checkpoint.name}-universal" if universal else checkpoint.name
    path, state, reason = None, None, "not all of it is there"
    try:
        path, state = engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
    except (EOFError, UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        reason = first_line(error)
    if path is None or state["step"] != checkpoint.step:
        raise CheckpointError(
            f"DeepSpeed could not load the checkpoint {directory / tag} ({reason}); delete it to go one back"
        )
    engine.global_steps = checkpoint.step
    if universal:
        # DeepSpeed gives all parameters one and the same count of steps, on the CPU: each step would count for several,
        # and a fused optimizer looks for it beside the parameter.
        for parameter, values in engine.optimizer.optimizer.state.items():
            values["step"] = values["step"].detach().clone().to(parameter.device)


def make_loadable(directory: Path, checkpoint: Checkpoint | None, world_size: int) -> None:
    """Convert a checkpoint of another number of ranks to the form that any number can load, beside it.

    Before the ranks are started: those that wait for each other give up after ten minutes.

    Raises:
        CheckpointError: it cannot be converted.
    """
    if checkpoint is None or checkpoint.world_size == world_size:
        return
    target = directory / f"{checkpoint.name}-universal"
    if target.exists():
        return
    for left in directory.glob(f"{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}")  # whoever was killed may have left a child
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(directory / checkpoint.name), "--output_folder", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    partial.rename(target)
