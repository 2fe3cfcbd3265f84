"""``python -m bench.tracking``: what tracking costs a training step: the driver's processor time as a share of it.

The driver follows the ranks: steps arrive as from a rank, one every ``--step-seconds``, are read from their log, sent
to MLflow (SQLite) and told to ``status``, and the machine's load is sampled; the work of the step itself is left out.
Beside it the same with a request for every step. Ranks do no more than append a line, which is measured too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from bench import measure
from jf_cluster.config import Config
from jf_cluster.tracking import Tracker, stage_run
from jf_cluster.train.progress import followed
from jf_cluster.train.steps_log import StepRecord, StepsLog


def record(step: int) -> StepRecord:
    """A step with as many figures as a real one."""
    return StepRecord(step, 2.0, 1.8, 0.01, 0.6, 1e-3, 1.2, 4600, 0.98, 0.6, 0, (1.0, 1.1, 0.9, 1.2), 1 << 30)


def driver_seconds(directory: Path, steps: int, step_s: float) -> tuple[float, float]:
    """Processor seconds the driver spends on ``steps`` steps, and the median seconds of a rank's append."""
    tracker = Tracker.open(Config.model_validate({"name": "bench", "runs_dir": directory}))
    path = directory / "round-001.steps.jsonl"
    log, appends = StepsLog(path, 0), []
    with tracker.stage(1, "train") as stage, followed(path, steps, "train", stage):
        begun, busy = time.perf_counter(), time.process_time()
        for step in range(1, steps + 1):
            before = time.perf_counter()
            log.append(record(step))
            appends.append(time.perf_counter() - before)
            time.sleep(max(0.0, begun + step * step_s - time.perf_counter()))
        spent = time.process_time() - busy
    log.close()
    assert stage.steps_of("train/loss") == set(range(1, steps + 1))
    return spent, statistics.median(appends)


def cost(steps: int, step_s: float, send_every_s: float) -> tuple[float, float]:
    """Share of a step, in processor time of one core, and the median seconds of a rank's append."""
    usual, stage_run.SEND_EVERY_S = stage_run.SEND_EVERY_S, send_every_s
    try:
        with tempfile.TemporaryDirectory() as directory:
            spent, append_s = driver_seconds(Path(directory), steps, step_s)
    finally:
        stage_run.SEND_EVERY_S = usual
    return spent / (steps * step_s), append_s


def main() -> None:
    arguments = measure.parser(__doc__ or "")
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--step-seconds", type=float, default=0.5, help="the embedded run's are 0.6 to 0.8")
    settings = arguments.parse_args()
    cost(4, 0.1, 0.0)  # imports and first connections are not tracking
    shares: dict[str, list[float]] = {"batched": [], "request_a_step": []}
    for _ in range(settings.repeats):
        batched, append_s = cost(settings.steps, settings.step_seconds, stage_run.SEND_EVERY_S)
        shares["batched"].append(batched)
        shares["request_a_step"].append(cost(settings.steps, settings.step_seconds, 0.0)[0])
    figures = {
        "step_seconds": settings.step_seconds,
        "share_of_a_step": measure.median(shares["batched"]),
        "share_of_a_step_with_a_request_a_step": measure.median(shares["request_a_step"]),
        "ratio_batched_vs_request_a_step": measure.ratio(shares["batched"], shares["request_a_step"]),
        "append_microseconds": 1e6 * append_s,
    }
    measure.report("tracking", figures, settings.json)


if __name__ == "__main__":
    main()
