"""A miniature of the run itself, measured: the same actors, ranks, store and decoding, on a few prompts and steps.

It evaluates the base on a few prompts, collects a few batches and trains a few steps in a directory of its own, which
is removed afterwards. So start-up times, disks, networks and other work on the machines are in its figures.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from jf_cluster.config import Config
from jf_cluster.evaluate import load_evaluation
from jf_cluster.planning.estimate import Rates
from jf_cluster.rounds import opened
from jf_cluster.train.steps_log import read_steps
from trajectory_store import TrajectoryStore

BATCHES = 2
"""Batches each collector decodes."""
STEPS = 12
EVALUATED = 32
"""Held-out prompts each worker decodes."""


@dataclass(frozen=True)
class Calibration:
    """Rates of a run, and how long responses are and what a token of them takes in the store."""

    rates: Rates
    response_tokens: float
    store_bytes_per_token: float


def miniature(config: Config, directory: Path) -> Config:
    """The configuration with a few prompts and steps, everything written under ``directory``."""
    collect, train, evaluate = config.collect, config.train, config.evaluate
    prompts = min(config.prompts.per_round, BATCHES * collect.workers * collect.batch_prompts)
    evaluated = min(evaluate.prompts, EVALUATED * collect.workers)
    # As many prompts are decoded for speed, and in mode multiblock, of all that are decoded, as in the run.
    timed, drafted = (
        -(-count * evaluated // evaluate.prompts)
        for count in (evaluate.speed_prompts, evaluate.multiblock_prompts or evaluate.prompts)
    )
    changes = {
        "name": "calibration",
        "runs_dir": directory,
        "store": None,
        "rounds": 1,
        "prompts": config.prompts.model_copy(update={"per_round": prompts}),
        "train": train.model_copy(update={"steps": min(STEPS, train.steps), "warmup_steps": 0}),
        "evaluate": evaluate.model_copy(
            update={"prompts": evaluated, "speed_prompts": timed, "multiblock_prompts": drafted}
        ),
        "tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{directory / 'mlflow.db'}"}),
    }
    return config.model_copy(update=changes)


def calibrate(config: Config) -> Calibration:
    """Run the miniature and give its rates.

    Raises:
        whatever the run itself would raise.
    """
    config.runs_dir.mkdir(parents=True, exist_ok=True)
    # Beside the run's own directory: nodes that share the one share the other.
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=config.runs_dir) as directory, _quietly():
        small = miniature(config, Path(directory))
        with opened(small) as rounds:
            rounds.evaluate(0)
            rounds.train(1)
            return measured(small)


def measured(config: Config) -> Calibration:
    """What the base's evaluation and the first round of a run took."""
    collected = json.loads((config.run_dir / "collecting" / "round-001.json").read_text())
    (counts,) = collected["attempts"]
    prompts, workers = counts["prompts"], config.collect.workers
    collect_prompt = (counts["respond_s"] + counts["trace_s"]) / prompts / workers
    collect_once = max(0.0, collected["seconds"] - prompts * collect_prompt)
    trained = json.loads((config.run_dir / "training" / "round-001.json").read_text())
    steps = read_steps(config.run_dir / "training" / "round-001.steps.jsonl")
    # The first steps allocate and compile.
    step = statistics.median(record.seconds for record in steps[len(steps) // 2 :])
    evaluation = load_evaluation(config, 0)
    assert evaluation is not None
    shards = TrajectoryStore(config.store_url).round(1).folder.entries()
    return Calibration(
        Rates(
            collect_once=collect_once,
            collect_prompt=collect_prompt,
            train_once=trained["seconds"] - trained["step_seconds"],
            train_step=step,
            evaluate_once=evaluation.start_seconds,
            evaluate_prompt=(evaluation.seconds - evaluation.start_seconds) / evaluation.prompts,
        ),
        counts["response_tokens"] / prompts,
        sum(size for name, size in shards.items() if name.startswith("shard-")) / counts["response_tokens"],
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Tables and messages of the miniature would be taken for the run's; warnings and progress bars are shown."""
    ours = logging.getLogger("jf_cluster")
    before = ours.level
    ours.setLevel(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        ours.setLevel(before)
