"""Following the ranks from the driver: a progress bar for people, metrics for MLflow, both from the log of steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from jf_cluster.progress import bars
from jf_cluster.tracking import StageRun
from jf_cluster.train.steps_log import StepRecord, StepsFollower

logger = logging.getLogger(__name__)

POLL_S = 0.5
_FIGURES = "loss {loss:.3f} · consistency {consistency:.3f} · ar {ar:.3f} · {rate:,.0f} tokens/s"


class _Follower:
    def __init__(self, path: Path, steps: int, stage: StageRun, first_unlogged: int) -> None:
        self._steps, self._stage, self._logged = steps, stage, first_unlogged - 1
        self._follower = StepsFollower(path)
        # About 200 points a curve: more makes MLflow slow and shows nothing.
        self._every = max(1, steps // 200)
        self._said = 0

    def run(self, title: str, stop: threading.Event) -> None:
        with bars() as bar:
            task = bar.add_task(title, total=self._steps, figures="starting ranks") if bar else None
            ended = False
            while not ended:
                ended = stop.wait(POLL_S)
                last = None
                for last in self._follower.new_records():
                    if last.step > self._logged and (last.step % self._every == 0 or last.step == self._steps):
                        self._logged = last.step
                        restarts = max(0, self._follower.starts - 1)
                        self._stage.metrics({**_metrics(last), "train/restarts": restarts}, step=last.step)
                if last is not None:
                    figures = _FIGURES.format(**asdict(last), rate=last.tokens / last.seconds)
                    self._stage.progress("steps", last.step, self._steps, 1 / last.seconds, figures)
                    if bar and task is not None:
                        bar.update(task, completed=last.step, figures=figures)
                    elif last.step * 10 // self._steps > self._said:
                        self._said = last.step * 10 // self._steps  # a log file gets ten lines instead of a bar
                        logger.info("%s: step %d of %d, %s", title, last.step, self._steps, figures)


def _metrics(record: StepRecord) -> dict[str, float]:
    values = {f"train/{k}": v for k, v in asdict(record).items() if k not in ("step", "consistency_by_ratio")}
    buckets = len(record.consistency_by_ratio)
    for bucket, value in enumerate(record.consistency_by_ratio):
        if value is not None:
            values[f"train/consistency_to_ratio_{(bucket + 1) / buckets:.2f}"] = value
    padding = max(0.0, 1 - record.fill)  # a sample longer than the budget fills more than all of it
    return {**values, "train/padding": padding, "train/tokens_per_s": record.tokens / record.seconds}


@contextmanager
def followed(path: Path, steps: int, title: str, stage: StageRun) -> Iterator[None]:
    """Show and record the log of steps at ``path`` while the block runs, from a thread of its own."""
    follower = _Follower(path, steps, stage, first_unlogged=max(stage.steps_of("train/loss"), default=0) + 1)
    stop = threading.Event()
    thread = threading.Thread(target=follower.run, args=(title, stop), name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
