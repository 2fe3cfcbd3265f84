"""The MLflow run of one stage: metrics, params, tags, files and its end, sent in batches or kept until they can be.

Everything goes through `MlflowClient` on an explicit run id: the fluent API keeps a process-wide active run, and a
worker's ``start_run`` would mark the shared run finished when it leaves. A store that cannot be reached never stops a
run: what could not be sent is kept in a journal (JSON lines) under the run directory, one warning says so, and it is
sent when the store answers again, by this process or by the next one that works on the run. A file that cannot be
copied while the store answers is left where it is, with a warning: what comes after it does not wait.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jf_cluster.messages import first_line
from jf_cluster.tracking.activity import Activity
from jf_cluster.tracking.store import NotCopiedError, client, copy_beside, refusals
from trajectory_store import without_secrets

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

SEND_EVERY_S = 2.0
"""Metrics that come faster than this travel together: a step may take a few milliseconds, a batch takes twenty."""
RETRY_AFTER_S = 60.0
"""How long an unreachable store is left alone before the next attempt."""
BATCH_METRICS = 1000
"""Most metrics MLflow takes in one request."""


@dataclass(frozen=True)
class Entry:
    """Something logged: what it is, its values, and when."""

    kind: Literal["metrics", "params", "tags", "artifact", "end"]
    values: dict[str, Any]
    step: int
    timestamp_ms: int


@dataclass
class StageRun:
    """The MLflow run of one stage; ``run_id`` is None while the store has not answered yet.

    For one thread. Another thread or process that has ``uri`` and ``run_id`` logs to the same run by :meth:`attach`,
    with a journal of its own, and calls :meth:`flush` when it is done; only :class:`Tracker` starts and ends runs.
    """

    uri: str
    run_id: str | None
    journal: Path
    activity: Activity | None = None
    """Where ``status`` reads what the stage is doing; for the stage's own process."""
    _unsent: list[Entry] = field(default_factory=list)
    _kept: int = 0
    """How many of the unsent entries, the first ones, are in the journal."""
    _sent_at: float = float("-inf")
    _not_before: float = 0.0
    _warned: bool = False
    _told: set[str] = field(default_factory=set)
    """Why files were not copied, each reason told once: the overview is copied again after every stage."""

    @classmethod
    def attach(cls, uri: str, run_id: str | None, journal: str | Path, *, quiet: bool = False) -> StageRun:
        """Log to an existing run from another thread or process; ``quiet`` where another one warns already."""
        run = cls(uri, run_id, Path(journal), _warned=quiet)
        run.take_over()
        return run

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step."""
        self._log(Entry("metrics", {k: float(v) for k, v in values.items()}, step, _now_ms()))

    def params(self, values: Mapping[str, object]) -> None:
        """Record what the stage was started with; nested mappings become dotted names. A param never changes:

        a value that differs after a resume is recorded as the tag ``changed.<name>``.
        """
        self._log(Entry("params", _flat(values), 0, _now_ms()))

    def tags(self, values: Mapping[str, object]) -> None:
        """Record or overwrite labels."""
        self._log(Entry("tags", {k: str(v) for k, v in values.items()}, 0, _now_ms()))

    def artifact(self, path: str | Path) -> None:
        """Keep a copy of a file beside the run."""
        self._log(Entry("artifact", {"path": str(path)}, 0, _now_ms()))

    def progress(self, unit: str, done: int, total: int, per_second: float, figures: str = "") -> None:
        """Tell ``status`` how far the stage is."""
        if self.activity is not None:
            self.activity.progress(unit, done, total, per_second, figures)

    def end(self, status: Status) -> None:
        """Mark the run ended, after everything else was sent."""
        self._unsent.append(Entry("end", {"status": status}, 0, _now_ms()))
        self.flush()

    def steps_of(self, metric: str) -> set[int]:
        """Steps at which ``metric`` was recorded, so that nothing is recorded twice; empty where nobody answers."""
        return set(self.values_of(metric))

    def values_of(self, metric: str) -> dict[int, float]:
        """What was recorded of ``metric`` last at each step; empty where nobody answers."""
        if self.run_id is None:
            return {}
        try:
            history = client(self.uri).get_metric_history(self.run_id, metric)
        except refusals() as error:
            place = without_secrets(self.uri)
            logger.warning("MLflow at %s: no history of %s (%s)", place, metric, first_line(error))
            return {}
        return {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}

    def flush(self) -> None:
        """Send what waits, or keep it where the store does not answer."""
        if not self._unsent:
            return
        if self.run_id is None or time.monotonic() < self._not_before:
            self._keep("no run could be created")
            return
        try:
            while self._unsent:
                batch = self._batch()
                try:
                    _send(self.uri, self.run_id, batch)
                except NotCopiedError as error:
                    if error.reason not in self._told:
                        self._told.add(error.reason)
                        logger.warning("%s; the run goes on", error)
                del self._unsent[: len(batch)]
                self._kept = max(0, self._kept - len(batch))
        except refusals() as error:
            self._not_before = time.monotonic() + RETRY_AFTER_S
            self._keep(first_line(error))
            return
        self._sent_at = time.monotonic()
        self.journal.unlink(missing_ok=True)

    def take_over(self) -> None:
        """Have what an earlier run of the stage had to keep in the journal sent before anything else."""
        if self.journal.exists():
            self._unsent = _entries(self.journal)
            self._kept = len(self._unsent)

    def _log(self, entry: Entry) -> None:
        self._unsent.append(entry)
        if time.monotonic() - self._sent_at >= SEND_EVERY_S:
            self.flush()

    def _batch(self) -> list[Entry]:
        """The first entries that one request can carry: as many metrics as fit, or anything else by itself."""
        count, size = 0, 0
        for entry in self._unsent:
            size += len(entry.values)
            if entry.kind != "metrics" or size > BATCH_METRICS:
                break
            count += 1
        return self._unsent[: max(count, 1)]

    def _keep(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            place = without_secrets(self.uri)
            logger.warning("MLflow at %s does not answer (%s); metrics are kept in %s", place, reason, self.journal)
        try:
            _append(self.journal, [json.dumps(asdict(entry)) for entry in self._unsent[self._kept :]])
        except OSError as error:  # a full disk; they wait in memory, and what it means for the run others tell
            logger.debug("metrics are not kept: %s", error)
            return
        self._kept = len(self._unsent)


def _append(journal: Path, lines: list[str]) -> None:
    """Add whole lines: none of them where that fails, and none to a line that a killed process left unfinished."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
        unfinished = stream.read() not in (b"", b"\n")
        left = ("\n" * unfinished + "".join(f"{line}\n" for line in lines)).encode()
        try:
            while left:
                left = left[stream.write(left) :]
        except OSError:
            stream.truncate(end)
            raise


def _entries(journal: Path) -> list[Entry]:
    entries = []
    for line in journal.read_text().splitlines():
        try:
            entries.append(Entry(**json.loads(line)))
        except ValueError:  # the last one of a process that was killed while it wrote
            logger.warning("%s: a line is incomplete and left out", journal)
    return entries


def _send(uri: str, run_id: str, batch: list[Entry]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    mlflow, entry = client(uri), batch[0]
    if entry.kind == "metrics":
        mlflow.log_batch(
            run_id, metrics=[Metric(k, v, e.timestamp_ms, e.step) for e in batch for k, v in e.values.items()]
        )
    elif entry.kind == "artifact":
        copy_beside(uri, run_id, Path(entry.values["path"]))
    elif entry.kind == "end":
        mlflow.set_terminated(run_id, entry.values["status"], entry.timestamp_ms)
    elif entry.kind == "tags":
        mlflow.log_batch(run_id, tags=[RunTag(k, v) for k, v in entry.values.items()])
    else:
        before = mlflow.get_run(run_id).data.params
        fresh = [Param(k, v) for k, v in entry.values.items() if k not in before]
        changed = [RunTag(f"changed.{k}", v) for k, v in entry.values.items() if before.get(k, v) != v]
        mlflow.log_batch(run_id, params=fresh, tags=changed)


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names; MLflow's params are strings of at most 6,000 characters."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)[:6000]
    return flat


def _now_ms() -> int:
    return int(time.time() * 1000)
