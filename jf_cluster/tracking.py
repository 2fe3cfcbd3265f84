"""MLflow: one parent run per distillation, one nested run per stage of a round, found again when a run resumes.

Everything goes through `MlflowClient` on an explicit run id: the fluent API keeps a process-wide active run, and a
worker's ``start_run`` would mark the shared run finished when it leaves. A store that cannot be reached never
stops a run: what could not be sent is kept in a journal (JSON lines) under the run directory, one warning says so,
and it is sent when the store answers again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from jf_cluster.config import Config

logger = logging.getLogger(__name__)

StageName = Literal["collect", "train", "evaluate"]
RETRY_AFTER_S = 60.0
"""How long an unreachable store is left alone before the next attempt."""
_KEY, _ROUND, _STAGE = "jf_cluster.run_key", "jf_cluster.round", "jf_cluster.stage"


@dataclass(frozen=True)
class Entry:
    """Something logged: what it is, its values, and when."""

    kind: Literal["metrics", "params", "tags", "artifact"]
    values: dict[str, Any]
    step: int
    timestamp_ms: int


@dataclass
class StageRun:
    """The MLflow run of one stage; ``run_id`` is None while the store has not answered yet.

    ``uri``, ``run_id`` and ``journal`` may be given to another process, which logs to the same run by
    :meth:`attach`; only :meth:`Tracker.stage` starts and ends runs.
    """

    uri: str
    run_id: str | None
    journal: Path
    _unsent: list[Entry] = field(default_factory=list)
    _not_before: float = 0.0
    _warned: bool = False

    @classmethod
    def attach(cls, uri: str, run_id: str | None, journal: str | Path) -> StageRun:
        """Log to an existing run from a worker process."""
        return cls(uri, run_id, Path(journal))

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

    def last_step(self, metric: str) -> int:
        """Last step at which ``metric`` was recorded, so that a resumed stage records no step twice; 0 when never."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return 0
        try:
            history = _client(self.uri).get_metric_history(self.run_id, metric)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s: no history of %s (%s)", self.uri, metric, str(error).splitlines()[0])
            return 0
        return max((point.step for point in history), default=0)

    def _log(self, entry: Entry) -> None:
        self._unsent.append(entry)
        if self.run_id is None or time.monotonic() < self._not_before:
            self._keep(entry, "no run could be created")
            return
        from mlflow.exceptions import MlflowException

        try:
            while self._unsent:
                _send(self.uri, self.run_id, self._unsent[0])
                self._unsent.pop(0)
        except (MlflowException, OSError) as error:
            self._not_before = time.monotonic() + RETRY_AFTER_S
            self._keep(entry, str(error).splitlines()[0])

    def _keep(self, entry: Entry, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("MLflow at %s does not answer (%s); metrics are kept in %s", self.uri, reason, self.journal)
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        # One write of a whole line in append mode: several processes may share the journal.
        with self.journal.open("a") as stream:
            stream.write(json.dumps({"run_id": self.run_id, **asdict(entry)}) + "\n")


@dataclass
class Tracker:
    """The distillation's parent run, and the door to its stages' runs."""

    uri: str
    experiment: str
    run_dir: Path
    run_name: str
    run_key: str
    experiment_id: str | None = None
    run_id: str | None = None

    @classmethod
    def open(cls, config: Config) -> Tracker:
        """Find or create the experiment and the parent run; never fails because MLflow does."""
        # Patient defaults (7 retries of 120 s) would stall a run for minutes; the journal makes patience needless.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        config.run_dir.mkdir(parents=True, exist_ok=True)
        tracker = cls(
            uri=tracking_uri(config),
            experiment=config.tracking.experiment or f"jacobi-forcing/{config.name}",
            run_dir=config.run_dir,
            run_name=config.name,
            run_key=_run_key(config.run_dir),
        )
        tracker._connect(config)
        return tracker

    def _connect(self, config: Config) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.experiment_id = _experiment(self.uri, self.experiment, config.runs_dir)
            self.run_id = self._run({_KEY: self.run_key, _STAGE: "distill"}, self.run_name, parent=None)
            StageRun(self.uri, self.run_id, self.run_dir / "tracking" / "distill.jsonl").params(
                config.model_dump(mode="json")
            )
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s cannot be used (%s); the run goes on", self.uri, str(error).splitlines()[0])

    @contextmanager
    def stage(self, round_number: int, name: StageName) -> Iterator[StageRun]:
        """The nested run of a stage, created or found again; marked finished or failed on leaving."""
        from mlflow.exceptions import MlflowException

        run_id = None
        title = f"round-{round_number:03d}-{name}"
        if self.run_id is not None:
            tags = {_KEY: self.run_key, _ROUND: str(round_number), _STAGE: name}
            try:
                run_id = self._run(tags, title, parent=self.run_id)
            except (MlflowException, OSError) as error:
                logger.warning("MLflow at %s: no run for %s (%s)", self.uri, title, str(error).splitlines()[0])
        stage = StageRun(self.uri, run_id, self.run_dir / "tracking" / f"{title}.jsonl")
        status = "FAILED"
        try:
            yield stage
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self._end(run_id, status)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Mark the parent run ended."""
        self._end(self.run_id, status)

    def close_abandoned(self) -> None:
        """Mark stages that a killed process left running as killed; for the one process that works on the run.

        A stage that is resumed runs again; one whose output had just appeared would look busy for ever.
        """
        from mlflow.exceptions import MlflowException

        if self.run_id is None or self.experiment_id is None:
            return
        try:
            client = _client(self.uri)
            wanted = f"tags.`{_KEY}` = '{self.run_key}' and attributes.status = 'RUNNING'"
            left = [run.info.run_id for run in client.search_runs([self.experiment_id], wanted)]
            for run_id in left:
                if run_id != self.run_id:
                    client.set_terminated(run_id, "KILLED")
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s does not answer (%s)", self.uri, str(error).splitlines()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")

    def _end(self, run_id: str | None, status: str) -> None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return
        try:
            _client(self.uri).set_terminated(run_id, status)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow at %s: run %s could not be marked %s (%s)", self.uri, run_id, status, error)

    def _run(self, tags: dict[str, str], title: str, parent: str | None) -> str:
        """Id of the run that carries ``tags``, running again; created when there is none."""
        assert self.experiment_id is not None
        client = _client(self.uri)
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([self.experiment_id], wanted, max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        link = {} if parent is None else {"mlflow.parentRunId": parent}
        return client.create_run(self.experiment_id, tags={**tags, **link}, run_name=title).info.run_id


def tracking_uri(config: Config) -> str:
    """Where MLflow keeps its records: the configuration, ``MLFLOW_TRACKING_URI``, else SQLite under ``runs_dir``."""
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    # SQLite's own wait for a lock is 5 s, too short when several stages and a dashboard share the file.
    return given or f"sqlite:///{config.runs_dir.absolute() / 'mlflow.db'}?timeout=60"


def _experiment(uri: str, name: str, runs_dir: Path) -> str:
    """Id of the experiment, created when missing; safe when several processes do so at once."""
    from mlflow.exceptions import MlflowException

    local = urlsplit(uri).scheme == "sqlite"
    # Two processes that create the same SQLite file both run its migrations, and one of them fails.
    with _locked(runs_dir / "mlflow.lock") if local else nullcontext():
        client = _client(uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            # Without a location, artifacts of an SQLite store land in ./mlruns of whoever runs first.
            location = (runs_dir.absolute() / "mlartifacts" / name).as_uri() if local else None
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        return found.experiment_id


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _run_key(run_dir: Path) -> str:
    """Identity of the run directory: one deleted and made anew must not continue the old MLflow run."""
    path = run_dir / "tracking" / "key"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text()


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _send(uri: str, run_id: str, entry: Entry) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client = _client(uri)
    if entry.kind == "artifact":
        client.log_artifact(run_id, entry.values["path"])
    elif entry.kind == "metrics":
        client.log_batch(
            run_id, metrics=[Metric(k, v, entry.timestamp_ms, entry.step) for k, v in entry.values.items()]
        )
    elif entry.kind == "tags":
        client.log_batch(run_id, tags=[RunTag(k, v) for k, v in entry.values.items()])
    else:
        before = client.get_run(run_id).data.params
        fresh = [Param(k, v) for k, v in entry.values.items() if k not in before]
        changed = [RunTag(f"changed.{k}", v) for k, v in entry.values.items() if before.get(k, v) != v]
        client.log_batch(run_id, params=fresh, tags=changed)


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
