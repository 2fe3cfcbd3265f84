"""What is checked before anything starts; what cannot work is refused with the setting to change in the message.

``python -m jf_cluster plan`` shows all of it with figures; a job only hears of what is refused.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from jf_cluster.cluster import joined_cluster
from jf_cluster.collect.prompts import check_prompts
from jf_cluster.config import Config, ConfigError
from jf_cluster.evaluate.graders import sandbox
from jf_cluster.evaluate.tasks import grader_of, questions
from jf_cluster.planning import memory
from jf_cluster.planning.fitting import Refusal, refused_on
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.memory import Need, shown
from jf_cluster.planning.shapes import ModelShape, read_shape
from jf_cluster.tracking.store import is_server, tracking_uri
from trajectory_store import StoreError, TrajectoryStore, without_secrets

MLFLOW_TIMEOUT_S = 5.0


class PreflightError(RuntimeError):
    """The machines lack what the run needs; the message says how much and what to change."""


def check(config: Config, asked_round: int | None = None) -> None:
    """Check that the run can work as configured, as far as that is known before Ray is joined.

    Args:
        asked_round: a round that the run is to be brought to, which may be past the configured ones.

    Raises:
        ConfigError: settings that contradict each other.
        PromptsError: prompts that cannot be read or are too few for all rounds.
        SandboxError: code that a grader has to run cannot be confined on this system.
        ModelError, UnsupportedModelError: the model cannot be used.
        PreflightError: too little memory or disk, too few GPUs, a path that cannot be written.
    """
    check_settings(config, asked_round)
    shape = read_shape(config)
    refusals = [*refused_by_model(config, shape), *refused_places(config, shape)]
    if joined_cluster(config) is None:
        refusals += refused_on(config, shape, Machines.here())
    raise_refused(refusals)


def check_cluster(config: Config) -> None:
    """Check that the Ray cluster this process has joined can hold the run; one of its own is this machine again.

    Raises:
        PreflightError: too few GPUs or too little memory.
    """
    if joined_cluster(config) is not None:
        raise_refused(list(refused_on(config, read_shape(config), Machines.joined())))


def check_settings(config: Config, asked_round: int | None = None) -> None:
    """Check what needs neither the model nor the machines; ``asked_round`` as in :func:`check`.

    Raises:
        ConfigError: settings that contradict each other.
        PromptsError: prompts that cannot be read or are too few for all rounds.
        SandboxError: code that a grader has to run cannot be confined on this system.
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
    check_prompts(config, max(config.collections, asked_round or 0))


def raise_refused(refusals: list[Refusal]) -> None:
    """Raise PreflightError with every refusal, one a line."""
    if refusals:
        raise PreflightError("\n".join(str(refusal) for refusal in refusals))


def refused_by_model(config: Config, shape: ModelShape) -> Iterator[Refusal]:
    """What cannot work whatever the machines."""
    for setting, tokens in (
        ("collect.max_new_tokens", config.collect.max_new_tokens),
        ("evaluate.max_new_tokens", config.evaluate.max_new_tokens),
    ):
        if tokens >= shape.context_tokens:
            yield Refusal(
                setting,
                f"a response of {tokens} tokens leaves no room for a prompt in the model's context of "
                f"{shape.context_tokens}: lower it",
            )


def refused_places(config: Config, shape: ModelShape) -> Iterator[Refusal]:
    """Paths that cannot be written, too little disk, and a data base of MLflow's that nothing here can talk to."""
    yield from filter(None, [_no_driver(config)])
    places = {"runs_dir": config.run_dir}
    if "://" not in config.store_url:
        places["store"] = Path(config.store_url)
    unwritable = [_unwritable("runs_dir", config.run_dir)]
    if config.store is not None:
        unwritable.append(_unwritable("store", places["store"]) if "store" in places else _unreachable(config.store))
    yield from filter(None, unwritable)
    if not any(unwritable):
        yield from _too_little_disk(config, shape, places)


def mlflow_warning(config: Config) -> str | None:
    """What to know when the MLflow server does not answer; the run goes on without it."""
    uri = without_secrets(tracking_uri(config))  # nor could urllib be asked with them
    if not is_server(uri):
        return None
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except OSError as error:
        return (
            f"tracking.uri: MLflow at {uri} does not answer ({error}); a run goes on, keeps its metrics and sends them "
            "when it does"
        )
    return None


def _no_driver(config: Config) -> Refusal | None:
    """Refuse a data base whose driver, which MLflow leaves to its users, is not installed."""
    uri = tracking_uri(config)
    if uri.partition(":")[0].partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        return None
    from sqlalchemy import create_engine

    try:
        create_engine(uri)
    except ModuleNotFoundError as error:
        return Refusal(
            "tracking.uri",
            f"{without_secrets(uri)} needs the Python package {error.name}: install it in the environment of every "
            "node, or name the one that is installed, as in postgresql+pg8000://",
        )
    return None


def _unwritable(setting: str, place: Path) -> Refusal | None:
    """Refuse a place that no file can be made in; nothing is left there, not even a folder."""
    there = next(p for p in (place, *place.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return Refusal(setting, f"{place} cannot be written ({error.strerror} in {there}): choose another place")


def _unreachable(url: str) -> Refusal | None:
    try:
        folder, name = TrajectoryStore(url).folder, f"plan-{uuid.uuid4().hex}"
        folder.publish(name, b"")
        folder.delete(name)
    except StoreError as error:
        return Refusal("store", f"{error}: give a store that can be written")
    return None


def _too_little_disk(config: Config, shape: ModelShape, places: dict[str, Path]) -> Iterator[Refusal]:
    """Refuse what has no room beside what the run has written before: a run that goes on fills its disk itself."""
    stored, run = memory.disk(config, shape)
    written = {part: _used(config.run_dir / part) for part in run.parts}  # its folders have these names
    if "store" in places:
        written["trajectories"] = _used(places["store"])
    needed: dict[int, dict[str, int]] = defaultdict(dict)  # by file system
    where: dict[int, Path] = {}
    if all(Path(config.model_dir(r)).is_dir() for r in range(1, config.rounds + 1)):
        run = Need(run.parts | {"checkpoints": 0})
    for setting, place in places.items():
        there = next(p for p in (place, *place.parents) if p.exists())
        parts = {"trajectories": stored} if setting == "store" else run.parts
        needed[there.stat().st_dev] |= parts
        where.setdefault(there.stat().st_dev, there)
    for system, parts in needed.items():
        need = Need({part: max(0, size - written[part]) for part, size in parts.items()})
        free = shutil.disk_usage(where[system]).free
        if need.total > free:
            largest = max(need.parts, key=lambda part: need.parts[part])
            setting = {
                "trajectories": "prompts.per_round",
                "checkpoints": "train.keep_checkpoints",
                "models": "rounds",
            }[largest]
            more = " more" if any(written[part] for part in parts) else ""
            yield Refusal(
                setting,
                f"the run needs about {shown(need.total)} of disk{more} ({need}) and {where[system]} has {shown(free)} "
                f"free: free some, set runs_dir or store, or lower {setting}",
            )


def _used(directory: Path) -> int:
    """Bytes that files under ``directory`` take of their disk; 0 where it is not there."""
    found = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a process that works there has just removed it
                found += 512 * Path(folder, name).lstat().st_blocks
    return found
