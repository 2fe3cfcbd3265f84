"""Everything the pictures are drawn from, gathered from a run's outputs and, for rates over time, from MLflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import Evaluation, evaluations_until
from jf_cluster.evaluate.looking import Look, load_look
from jf_cluster.jacobi.text import pieces
from jf_cluster.messages import first_line
from jf_cluster.models import load_tokenizer
from jf_cluster.tracking.store import KEY, ROUND, STAGE, SUPERSEDED_BY, client, refusals
from jf_cluster.tracking.tracker import Tracker
from trajectory_store import Trajectory, TrajectoryReader, TrajectoryStore

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 500
"""Responses of a round that are looked at: enough for figures, and a store may hold millions."""
RATES = {"collect": "response_tokens_per_s", "train": "train/tokens_per_s"}


@dataclass(frozen=True)
class Collected:
    """A sample of the trajectories that model ``model`` made."""

    model: int
    block_size: int
    iterations: np.ndarray
    """Of each whole block, [B]."""
    accepted: np.ndarray
    """Accepted prefix of each whole block after its first pass, [B]."""
    example: Trajectory
    words: tuple[str, ...]
    """Text of each token of the example's response."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second of a stage at a moment."""

    round: int
    stage: str
    seconds: float
    """Since the run's first figure."""
    tokens_per_s: float


@dataclass(frozen=True)
class Gathered:
    """What is known of a run so far."""

    name: str
    evaluations: tuple[Evaluation, ...]
    collected: tuple[Collected, ...]
    looks: tuple[Look, ...]
    rates: tuple[Rate, ...]


def gather(config: Config, tracker: Tracker, last_round: int) -> Gathered:
    """Gather what rounds 0 to ``last_round`` have put out."""
    rounds = range(last_round + 1)
    store = TrajectoryStore(config.store_url)
    sealed = [folder for r in rounds if (folder := store.round(r + 1)).is_sealed]
    return Gathered(
        name=config.name,
        evaluations=tuple(evaluations_until(config, last_round)),
        collected=tuple(
            c for folder in sealed if (c := _collected(config, folder.number - 1, folder.reader())) is not None
        ),
        looks=tuple(look for r in rounds if (look := load_look(config, r)) is not None),
        rates=_rates(tracker),
    )


def _collected(config: Config, model: int, reader: TrajectoryReader) -> Collected | None:
    """A sample of a round's rows; None where no response is as long as a block."""
    block_size = reader.manifest.provenance.block_size
    rows = [reader[i] for i in np.linspace(0, len(reader) - 1, min(SAMPLED_ROWS, len(reader)), dtype=int)]
    iterations, accepted = [], []
    for row in rows:
        whole = row.block_lengths(block_size) == block_size
        # Accepted prefixes of iterates 0..K-1 lie block after block; a block done in one pass stores only iterate 0.
        first = np.cumsum(row.iterations) - row.iterations + 1
        several = row.iterations > 1
        after = np.full(len(row.iterations), block_size)
        after[several] = row.accepted[first[several]]
        iterations.append(row.iterations[whole])
        accepted.append(after[whole])
    if not sum(map(len, iterations)):
        return None
    example = max(rows[:20], key=lambda row: len(row.response))
    tokenizer = load_tokenizer(config)
    return Collected(
        model=model,
        block_size=block_size,
        iterations=np.concatenate(iterations),
        accepted=np.concatenate(accepted),
        example=example,
        words=pieces(tokenizer.decode, example.prompt.tolist(), example.response.tolist()),
    )


def _rates(tracker: Tracker) -> tuple[Rate, ...]:
    if tracker.run_id is None:
        return ()
    points = []
    try:
        mlflow = client(tracker.uri)
        for run in mlflow.search_runs([str(tracker.experiment_id)], f"tags.`{KEY}` = '{tracker.run_key}'"):
            if (metric := RATES.get(run.data.tags[STAGE])) and SUPERSEDED_BY not in run.data.tags:
                history = mlflow.get_metric_history(run.info.run_id, metric)
                points += [(p.timestamp, int(run.data.tags[ROUND]), run.data.tags[STAGE], p.value) for p in history]
    except refusals() as error:
        logger.warning("MLflow at %s: no rates (%s)", tracker.place, first_line(error))
    points.sort()
    return tuple(Rate(r, stage, (t - points[0][0]) / 1000, value) for t, r, stage, value in points)


def overview_path(config: Config) -> Path:
    """File of the page with all pictures."""
    return config.run_dir / "overview.html"
