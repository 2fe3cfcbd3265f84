"""``python -m jf_cluster status``: what a run is doing, read from its directory and its store alone.

Neither Ray nor MLflow is asked, nothing is locked and nothing heavy is imported, so it answers at once, during a run,
after a crash, and from any machine that sees the files.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jf_cluster.config import Config, load_config
from jf_cluster.evaluate.evaluation import made_hash
from jf_cluster.progress import span
from jf_cluster.run_log import last_troubles
from jf_cluster.tracking.activity import Now, read_activity
from trajectory_store import Round, TrajectoryStore

TROUBLES = 4
"""Warnings and errors shown."""
VERBS = {"collect": "collecting", "train": "training", "evaluate": "evaluating"}


class _Mode(BaseModel):
    accuracy: float | None
    tpf: float


class _Evaluation(BaseModel):
    """What is shown of an evaluation; of an earlier version's file the rest need not be readable."""

    model_hash: str
    ar: _Mode
    jacobi: _Mode
    multiblock: _Mode
    passed: bool


@dataclass(frozen=True)
class RoundStatus:
    """How far a round is: its trajectories, the model they train, and that model's evaluation."""

    round: int
    trajectories: str
    model: str
    evaluation: str
    stages_done: int


@dataclass(frozen=True)
class Status:
    """Everything the terminal shows."""

    name: str
    where: Path
    now: list[Now]
    rounds: tuple[RoundStatus, ...]
    stages_left: int
    checkpoint: str
    troubles: tuple[str, ...]


class StatusReader:
    """Reads the status of one run again and again; shards read before are not read twice."""

    def __init__(self, config: Config) -> None:
        self._run_dir = config.run_dir
        self._config = config
        self._store = TrajectoryStore(config.store_url)
        self._open: dict[int, Round] = {}

    def read(self) -> Status:
        recorded = self._run_dir / "config.yaml"
        config = load_config(recorded) if recorded.is_file() else self._config
        rounds = tuple(self._round(config, number) for number in range(config.rounds + 1))
        done = sum(r.stages_done for r in rounds)
        if config.collect.after_last:
            done += self._trajectories(config, config.rounds + 1)[1]
        return Status(
            name=config.name,
            where=self._run_dir,
            now=read_activity(self._run_dir),
            rounds=rounds,
            stages_left=config.collections + 2 * config.rounds + 1 - done,
            checkpoint=self._checkpoint(),
            troubles=tuple(last_troubles(self._run_dir, TROUBLES)),
        )

    def _round(self, config: Config, number: int) -> RoundStatus:
        evaluation, evaluated = self._evaluation(config, number)
        if number == 0:
            return RoundStatus(0, "", "base", evaluation, evaluated)
        trajectories, collected = self._trajectories(config, number)
        model, trained = self._model(config, number)
        return RoundStatus(number, trajectories, model, evaluation, collected + trained + evaluated)

    def _trajectories(self, config: Config, number: int) -> tuple[str, bool]:
        folder = self._open.setdefault(number, self._store.round(number))
        if folder.is_sealed:
            sealed = folder.manifest
            return (
                f"{sealed.rows} · {sealed.iterations_per_block:.2f} iterations/block{_rejected(sealed.rejects)}",
                True,
            )
        committed = len(folder.committed_ids())
        if not committed:
            return "", False
        return f"{committed} of {config.prompts.per_round}{_rejected(len(folder.rejects()))}", False

    def _model(self, config: Config, number: int) -> tuple[str, bool]:
        if Path(config.model_dir(number)).is_dir():
            return "trained", True
        steps = self._run_dir / "training" / f"round-{number:03d}.steps.jsonl"
        # A line being written, or cut by a kill, has no end yet.
        whole, newline, _ = steps.read_text().rpartition("\n") if steps.is_file() else ("", "", "")
        last = whole.rpartition("\n")[2]
        return (f"step {json.loads(last)['step']} of {config.train.steps}" if newline else ""), False

    def _evaluation(self, config: Config, number: int) -> tuple[str, bool]:
        path = self._run_dir / "evaluation" / f"round-{number:03d}.json"
        if not path.is_file():
            return "", False
        try:
            found = _Evaluation.model_validate_json(path.read_bytes())
        except ValidationError:
            return f"{path.name} cannot be read", False
        if made_hash(config, number) not in (None, found.model_hash):
            return "", False
        accuracy = "" if found.ar.accuracy is None else f" · accuracy {100 * found.ar.accuracy:.1f}%"
        failed = "" if found.passed else " · failed"
        return f"TPF {max(found.jacobi.tpf, found.multiblock.tpf):.2f}{accuracy}{failed}", True

    def _checkpoint(self) -> str:
        whole = list((self._run_dir / "checkpoints").glob("round-*/step-*/complete.json"))
        models = list((self._run_dir / "models").glob("round-*/lineage.json"))
        written: dict[Path, float] = {}
        for path in whole + models:
            with contextlib.suppress(FileNotFoundError):  # a newer checkpoint has just taken its place
                written[path] = path.stat().st_mtime
        if not written:
            return "none yet"
        newest = max(written, key=written.__getitem__)
        what = f"model {newest.parent.name}" if newest in models else f"{newest.parts[-3]} {newest.parent.name}"
        return f"{what}, {_ago(written[newest])}"


def _rejected(count: int) -> str:
    return f" · {count} rejected" if count else ""


def rendered(status: Status) -> RenderableType:
    """The status for a terminal."""
    table = Table("round", "trajectories", "model", "evaluation")
    for row in status.rounds:
        table.add_row(str(row.round), row.trajectories, row.model, row.evaluation)
    left = f"{status.stages_left} stages left" if status.stages_left else "all rounds done"
    parts: list[RenderableType] = [
        Text.assemble((status.name, "bold"), f"  {status.where}  ·  {left}"),
        table,
        *(part for now in status.now for part in _now(now)),
        *([] if status.now else [Text("no stage has run yet")]),
        Text(f"last checkpoint: {status.checkpoint}"),
    ]
    if status.troubles:
        parts.append(Text("last warnings and errors:", style="yellow"))
        parts += [Text(f"  {line}", overflow="ellipsis", no_wrap=True) for line in status.troubles]
    return Group(*parts)


def _now(now: Now) -> list[RenderableType]:
    what = f"{VERBS[now.stage]} round {now.round}"
    if now.state == "running" and not now.alive:
        text = f"killed while {what} ({_progress(now)}); the same command carries on from there"
        return [Text(text, style="red")]
    if now.state != "running":
        style = "" if now.state == "finished" else "red"
        return [Text(f"last stage: {what}, {now.state} {_ago(now.updated)} {now.error}".rstrip(), style=style)]
    shown: list[RenderableType] = [
        Text.assemble((what, "bold green"), f" for {span(time.time() - now.begun)} (process {now.pid} on {now.host})")
    ]
    if now.total:
        shown += [
            ProgressBar(total=now.total, completed=now.done, width=60),
            Text(f"{_progress(now)} · last change {_ago(now.updated)}"),
        ]
    return shown


def _progress(now: Now) -> str:
    if not now.total:
        return "nothing counted yet"
    left = "" if now.left_s is None else f" · {span(now.left_s)} left"
    figures = f" · {now.figures}" if now.figures else ""
    return f"{now.done} of {now.total} {now.unit} · {now.per_second:.1f}/s{left}{figures}"


def _ago(moment: float) -> str:
    return f"{span(time.time() - moment)} ago"
