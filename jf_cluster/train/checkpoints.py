"""A round's training checkpoints: naming, completeness, choosing one to resume from, keeping the last few.

A checkpoint is a directory ``step-000100`` of DeepSpeed files. It counts only when it holds ``complete.json``, which
is renamed into place after every rank has written its part; anything else is debris of a rank that died while
saving, ignored when resuming and swept at the next save. The directory is on storage that all ranks share.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

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

    @property
    def name(self) -> str:
        return f"step-{self.step:06d}"


def whole_checkpoints(directory: Path) -> list[Checkpoint]:
    """All complete checkpoints under ``directory``, oldest first."""
    return sorted(
        (Checkpoint(**json.loads(path.read_text())) for path in directory.glob(f"step-*/{_COMPLETE}")),
        key=lambda checkpoint: checkpoint.step,
    )


def save(engine: DeepSpeedEngine, directory: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint from all ranks together, then drop all but the last ``keep`` and any debris."""
    target = directory / checkpoint.name
    if engine.global_rank == 0 and target.exists():
        shutil.rmtree(target)  # debris of the same step; DeepSpeed would write between its files
    dist.barrier()
    engine.save_checkpoint(str(directory), tag=checkpoint.name, client_state=asdict(checkpoint), save_latest=False)
    if engine.global_rank != 0:
        return
    marker = target / f".{_COMPLETE}"
    with marker.open("w") as stream:
        json.dump(asdict(checkpoint), stream)
        stream.flush()
        os.fsync(stream.fileno())
    marker.rename(target / _COMPLETE)
    kept = {c.name for c in whole_checkpoints(directory)[-keep:]}
    for path in directory.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)


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


def load(engine: DeepSpeedEngine, directory: Path, checkpoint: Checkpoint) -> None:
    """Restore weights, optimizer and schedule on all ranks; ``engine`` was built for the right kind of checkpoint."""
    universal = checkpoint.world_size != dist.get_world_size()
    tag = f"{checkpoint.name}-universal" if universal else checkpoint.name
    path, state = engine.load_checkpoint(str(directory), tag=tag)
    if path is None or state["step"] != checkpoint.step:
        raise CheckpointError(f"DeepSpeed could not load the checkpoint {directory / tag}; delete it to go one back")
    engine.global_steps = checkpoint.step


def make_universal(directory: Path, checkpoint: Checkpoint) -> None:
    """Convert a checkpoint to the form that any number of ranks can load, beside it; one rank calls this."""
    target = directory / f"{checkpoint.name}-universal"
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(directory / checkpoint.name), "--output_folder", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    partial.rename(target)
