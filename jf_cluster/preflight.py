"""What is checked before anything starts: prompts, memory and disk, with the setting to change in the message."""

from __future__ import annotations

import shutil

import psutil

from jf_cluster.collect.prompts import check_prompts
from jf_cluster.config import Config, ConfigError
from jf_cluster.evaluate.graders import sandbox
from jf_cluster.evaluate.tasks import grader_of, questions
from jf_cluster.models import resolve

GIB = 1 << 30

PROCESS_BYTES = 500 << 20
"""A Ray worker with torch and transformers loaded (measured 450 MB, with deepspeed 540 MB)."""
TRAINING_BYTES_PER_PARAMETER = 16
"""float32 weights, gradients and Adam's two moments."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
STORE_BYTES_PER_TOKEN = 64
"""Generous: what a response token and its block's trajectory take on disk at most."""


class PreflightError(RuntimeError):
    """The machine lacks what the run needs; the message says how much and what to change."""


def check(config: Config) -> None:
    """Check that the run can work as configured.

    Raises:
        ConfigError: settings that contradict each other.
        PromptsError: prompts that cannot be read or are too few for all rounds.
        SandboxError: code that a grader has to run cannot be confined on this system.
        PreflightError: too little memory or disk.
    """
    if config.collect.responses == "verified" and config.prompts.grader == "none":
        raise ConfigError("collect.responses=verified needs a grader: set prompts.grader, or use base or self")
    if config.prompts.grader != "none" and config.prompts.source != "tiny" and config.prompts.answer_column is None:
        raise ConfigError(f"prompts.grader={config.prompts.grader} needs prompts.answer_column")
    if config.evaluate.task != "held_out":
        questions(config)
    elif config.evaluate.prompts > config.prompts.held_out:
        raise ConfigError(
            f"evaluate.prompts ({config.evaluate.prompts}) must not exceed prompts.held_out ({config.prompts.held_out})"
        )
    if "code" in (config.prompts.grader, grader_of(config)):
        sandbox.check(config.sandbox)
    check_prompts(config, config.rounds + 1)
    weights = sum(file.stat().st_size for file in resolve(config.model.base).glob("*.safetensors"))
    _check_memory(config, weights)
    _check_disk(config, weights)


def _check_memory(config: Config, weights: int) -> None:
    """Refuse what cannot fit this machine's memory; where weights live on GPUs only the processes count."""
    models = 1 if config.collect.responses == "self" else 2
    collecting = config.collect.workers * (
        PROCESS_BYTES + (0 if config.collect.gpus_per_worker else models * 2 * weights)
    )
    on_host = config.train.gpus_per_worker == 0 or config.train.zero.offload == "all"
    training = config.train.workers * PROCESS_BYTES + (TRAINING_BYTES_PER_PARAMETER * weights // 2 if on_host else 0)
    available = psutil.virtual_memory().available
    if max(collecting, training) > available:
        setting = "collect.workers" if collecting > training else "train.workers or the model"
        raise PreflightError(
            f"the run needs about {max(collecting, training) / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB "
            f"are free: lower {setting}, or free some"
        )


def _check_disk(config: Config, weights: int) -> None:
    parameters = weights // 2
    tokens = config.prompts.per_round * config.collect.max_new_tokens * (config.rounds + 1)
    stored = 0 if config.store and "://" in config.store else tokens * STORE_BYTES_PER_TOKEN
    kept = (config.train.keep_checkpoints + 1) * CHECKPOINT_BYTES_PER_PARAMETER * parameters
    exported = config.rounds * 4 * parameters
    needed = stored + kept + exported
    place = next(p for p in (config.run_dir, *config.run_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PreflightError(
            f"the run needs about {needed / GIB:.1f} GiB of disk ({stored / GIB:.1f} trajectories, {kept / GIB:.1f} "
            f"checkpoints, {exported / GIB:.1f} models) and {place} has {free / GIB:.1f} GiB free: free some, set "
            "runs_dir, or lower prompts.per_round or train.keep_checkpoints"
        )
