"""The distillation's parent run in MLflow, and the door to the nested runs of its stages."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from jf_cluster.config import Config
from jf_cluster.messages import first_line
from jf_cluster.tracking.activity import working
from jf_cluster.tracking.stage_run import StageRun, Status
from jf_cluster.tracking.store import (
    KEY,
    ROUND,
    STAGE,
    SUPERSEDED_BY,
    client,
    experiment_id,
    experiment_name,
    refusals,
    run_key,
    tracking_uri,
)
from jf_cluster.tracking.system import system_metrics
from trajectory_store import without_secrets

logger = logging.getLogger(__name__)

StageName = Literal["collect", "train", "evaluate"]
PARENT = "distill"


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
    _active: set[str] = field(default_factory=set)
    """Stages that go on, two in pipelined rounds: their journals are their own."""

    @classmethod
    def open(cls, config: Config) -> Tracker:
        """Find or create the experiment and the parent run; never fails because MLflow does."""
        # Patient defaults (7 retries of 120 s) would stall a run for minutes; the journal makes patience needless.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        # It prints the traceback of every error of its data base; what it means is said in one line here.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        tracker = cls(
            uri=tracking_uri(config),
            experiment=experiment_name(config),
            run_dir=config.run_dir,
            run_name=config.name,
            run_key=run_key(config.run_dir),
        )
        try:
            tracker._connect()
        except refusals() as error:
            logger.warning("MLflow at %s cannot be used (%s); the run goes on", tracker.place, first_line(error))
        tracker.parent.params(config.shown())
        return tracker

    def _connect(self) -> None:
        """Find or create the parent run, and send what earlier processes kept while the store did not answer."""
        self.experiment_id = experiment_id(self.uri, self.experiment, self.run_dir.parent)
        tags = {KEY: self.run_key, STAGE: PARENT}
        known = self._find(tags)
        self.run_id = self._again(known) if known else self._create(tags, self.run_name)
        self._replay()

    @property
    def place(self) -> str:
        """``uri`` as it may be shown."""
        return without_secrets(self.uri)

    @cached_property
    def parent(self) -> StageRun:
        """The distillation's own run."""
        return StageRun.attach(self.uri, self.run_id, self._journal(PARENT), quiet=self.run_id is None)

    @contextmanager
    def stage(
        self, round_number: int, name: StageName, *, task: str | None = None, anew: bool = False
    ) -> Iterator[StageRun]:
        """The nested run of a stage, created or found again; marked finished or failed on leaving.

        A stage whose run is finished is being made again, since its output was there once: it gets a new run, as it
        does with ``anew``, for a run that was killed before it could be marked. While it lasts, the machines' load is
        recorded in it, and ``status`` says what it is doing. An evaluation on another ``task`` than the run's own has
        runs of its own.
        """
        self._catch_up()
        run_id = None
        key = name if task is None else f"{name}-{task}"
        title = f"round-{round_number:03d}-{key}"
        if self.run_id is not None:
            try:
                run_id = self._unfinished_or_new_run(round_number, key, anew)
            except refusals() as error:
                logger.warning("MLflow at %s: no run for %s (%s)", self.place, title, first_line(error))
        status: Status = "FAILED"
        self._active.add(title)
        with working(self.run_dir, round_number, name) as activity:
            stage = StageRun(self.uri, run_id, self._journal(title), activity)
            stage.take_over()
            try:
                with system_metrics(stage):
                    yield stage
                status = "FINISHED"
            except KeyboardInterrupt:
                status = "KILLED"
                raise
            finally:
                stage.end(status)
                self._active.discard(title)

    def finish(self, status: Status = "FINISHED") -> None:
        """Mark the parent run ended."""
        self._catch_up()
        self.parent.end(status)

    def close_abandoned(self) -> None:
        """Mark stages that a killed process left running as killed; for the one process that works on the run.

        A stage that is resumed runs again; one whose output had just appeared would look busy for ever.
        """
        if self.run_id is None or self.experiment_id is None:
            return
        try:
            mlflow = client(self.uri)
            wanted = f"tags.`{KEY}` = '{self.run_key}' and attributes.status = 'RUNNING'"
            left = [run.info.run_id for run in mlflow.search_runs([self.experiment_id], wanted)]
            for run_id in left:
                if run_id != self.run_id:
                    mlflow.set_terminated(run_id, "KILLED")
        except refusals() as error:
            logger.warning("MLflow at %s does not answer (%s)", self.place, first_line(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _journal(self, title: str) -> Path:
        return self.run_dir / "tracking" / f"{title}.jsonl"

    def _catch_up(self) -> None:
        """Between stages, try again with what could not be sent or created before."""
        try:
            if self.run_id is None:
                self._connect()
                self.parent.run_id = self.run_id
            else:
                self._replay()
        except refusals() as error:
            logger.debug("MLflow at %s still does not answer (%s)", self.place, first_line(error))

    def _replay(self) -> None:
        """Send what stages of this and earlier processes kept while the store did not answer."""
        for journal in sorted((self.run_dir / "tracking").glob("*.jsonl")):
            found = re.match(r"round-(\d+)-([a-z]+(?:-\w+)?)\b", journal.name)
            if found and found[0] not in self._active:
                number, key = int(found[1]), found[2]
                run_id = self.stage_run(number, key) or self._new_stage_run(number, key)
                StageRun.attach(self.uri, run_id, journal).flush()

    def stage_run(self, round_number: int, key: str) -> str | None:
        """Id of a stage's newest run, None where there is none; ``key`` is its name, with ``-task`` as in ``stage``."""
        return self._find({KEY: self.run_key, ROUND: str(round_number), STAGE: key})

    def _unfinished_or_new_run(self, round_number: int, key: str, anew: bool) -> str:
        mlflow, known = client(self.uri), self.stage_run(round_number, key)
        if known and not anew and mlflow.get_run(known).info.status != "FINISHED":
            return self._again(known)
        run_id = self._new_stage_run(round_number, key)
        if known:
            mlflow.set_tag(known, SUPERSEDED_BY, run_id)
        return run_id

    def _new_stage_run(self, round_number: int, key: str) -> str:
        tags = {KEY: self.run_key, ROUND: str(round_number), STAGE: key}
        return self._create({**tags, "mlflow.parentRunId": str(self.run_id)}, f"round-{round_number:03d}-{key}")

    def _find(self, tags: dict[str, str]) -> str | None:
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        newest_first = ["attributes.start_time DESC"]
        found = client(self.uri).search_runs([str(self.experiment_id)], wanted, max_results=1, order_by=newest_first)
        return found[0].info.run_id if found else None

    def _create(self, tags: dict[str, str], title: str) -> str:
        return client(self.uri).create_run(str(self.experiment_id), tags=tags, run_name=title).info.run_id

    def _again(self, run_id: str) -> str:
        client(self.uri).update_run(run_id, status="RUNNING")
        return run_id
