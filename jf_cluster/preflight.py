"""What is checked before anything starts; what cannot work is refused with the setting to change in the message.

``python -m jf_cluster plan`` shows all of it with figures; a job only hears of what is refused.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import urllib.error
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jf_cluster.cluster import joined_cluster
from jf_cluster.collect.prompts import check_prompts
from jf_cluster.config import Config, ConfigError
from jf_cluster.evaluate.graders import sandbox
from jf_cluster.evaluate.tasks import grader_of, questions
from jf_cluster.planning import memory
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.memory import GPU_RESERVE_BYTES, PROCESS_BYTES, Need, shown
from jf_cluster.planning.shapes import ModelShape, read_shape
from jf_cluster.tracking.store import is_server, tracking_uri
from trajectory_store import StoreError, TrajectoryStore

MLFLOW_TIMEOUT_S = 5.0
OFFLOADS = ("none", "optimizer", "all")
"""Values of train.zero.offload, from none of the memory to most of it."""


class PreflightError(RuntimeError):
    """The machines lack what the run needs; the message says how much and what to change."""


@dataclass(frozen=True)
class Refusal:
    """Why a run cannot work, and the setting to change."""

    setting: str
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


def check(config: Config) -> None:
    """Check that the run can work as configured, as far as that is known before Ray is joined.

    Raises:
        ConfigError: settings that contradict each other.
        PromptsError: prompts that cannot be read or are too few for all rounds.
        SandboxError: code that a grader has to run cannot be confined on this system.
        ModelError, UnsupportedModelError: the model cannot be used.
        PreflightError: too little memory or disk, too few GPUs, a path that cannot be written.
    """
    check_settings(config)
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


def check_settings(config: Config) -> None:
    """Check what needs neither the model nor the machines.

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
    check_prompts(config, config.rounds + 1)


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
    """Paths that cannot be written, and too little disk."""
    places = {"runs_dir": config.run_dir}
    if "://" not in config.store_url:
        places["store"] = Path(config.store_url)
    unwritable = [_unwritable("runs_dir", config.run_dir)]
    if config.store is not None:
        unwritable.append(_unwritable("store", places["store"]) if "store" in places else _unreachable(config.store))
    yield from filter(None, unwritable)
    if not any(unwritable):
        yield from _too_little_disk(config, shape, places)


def refused_on(config: Config, shape: ModelShape, machines: Machines) -> Iterator[Refusal]:
    """What cannot work on these machines: too few GPUs, or too little memory in a stage; every setting once."""
    told: set[str] = set()
    for refusal in _refused_stages(config, shape, machines):
        if refusal.setting not in told:
            told.add(refusal.setting)
            yield refusal


def _refused_stages(config: Config, shape: ModelShape, machines: Machines) -> Iterator[Refusal]:
    stages = {
        "collect": (config.collect, memory.collecting(config, shape)),
        "evaluate": (config.collect, memory.evaluating(config, shape)),
        "train": (config.train, _train_need(config, shape, machines)),
    }
    for stage, (placed, need) in stages.items():
        if placed.gpus_per_worker == 0:
            yield from _too_little_host_memory(config, shape, machines, stage, placed.workers, need)
        elif placed.workers * placed.gpus_per_worker > machines.gpus:
            yield _too_few_gpus("train" if stage == "train" else "collect", placed, machines)
        elif machines.gpu_bytes and need.total + GPU_RESERVE_BYTES > machines.gpu_bytes * min(
            1.0, placed.gpus_per_worker
        ):
            yield _too_little_gpu_memory(config, shape, machines, stage, need)
        elif stage == "train":
            yield from _too_little_host_memory(config, shape, machines, stage, placed.workers, Need({}))


def mlflow_warning(config: Config) -> str | None:
    """What to know when the MLflow server does not answer; the run goes on without it."""
    uri = tracking_uri(config)
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


def train_nodes(config: Config, machines: Machines) -> int:
    """Nodes that the ranks are spread over."""
    if config.train.gpus_per_worker == 0:
        return machines.nodes
    return min(machines.nodes, math.ceil(config.train.workers * config.train.gpus_per_worker / machines.gpus_per_node))


def _train_need(config: Config, shape: ModelShape, machines: Machines) -> Need:
    return memory.training(config, shape, train_nodes(config, machines))[1]


def _too_few_gpus(stage: str, placed: Any, machines: Machines) -> Refusal:
    return Refusal(
        f"{stage}.workers",
        f"{placed.workers} workers with {stage}.gpus_per_worker={placed.gpus_per_worker:g} need "
        f"{math.ceil(placed.workers * placed.gpus_per_worker)} GPUs and {machines.name} has {machines.gpus}: "
        "lower it, or add GPUs",
    )


def _too_little_gpu_memory(config: Config, shape: ModelShape, machines: Machines, stage: str, need: Need) -> Refusal:
    """The refusal, with settings under which the stage would fit, where there are any."""
    placed = config.train if stage == "train" else config.collect
    there = int(min(1.0, placed.gpus_per_worker) * machines.gpu_bytes) - GPU_RESERVE_BYTES
    short = f"a GPU of {machines.name} has {shown(there)} to give and a worker needs {shown(need.total)} ({need})"
    for setting, changes in _remedies(config, stage):
        other = changed(config, changes)
        if stage == "train":
            host, device = memory.training(other, shape, train_nodes(other, machines))
            fits = device.total <= there and host.total <= machines.host_bytes
        else:
            fits = (memory.collecting if stage == "collect" else memory.evaluating)(other, shape).total <= there
        if fits:
            told = " ".join(f"{key}={_setting(value)}" for key, value in changes.items())
            return Refusal(setting, f"{short}: set {told}")
    if stage == "train":
        return Refusal("train.workers", f"{short}: {_enough_ranks(config, shape, machines, there)}")
    return Refusal("model.path", f"{short}: one GPU has to hold a whole model; use larger GPUs or a smaller model")


def _remedies(config: Config, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings to try, the cheapest first: the one to name, and all that change together."""
    tried: dict[str, Any] = {}
    if stage == "train":
        if not config.train.gradient_checkpointing:
            tried["train.gradient_checkpointing"] = True
            yield "train.gradient_checkpointing", dict(tried)
        for offload in OFFLOADS[OFFLOADS.index(config.train.zero.offload) + 1 :]:
            tried["train.zero.offload"] = offload
            yield "train.zero.offload", dict(tried)
        tokens = config.train.micro_batch_tokens
        while (tokens := tokens // 2) > memory.longest_sample(config):
            tried["train.micro_batch_tokens"] = tokens
            yield "train.micro_batch_tokens", dict(tried)
        return
    keys = ["evaluate.batch_prompts"] if stage == "evaluate" else ["collect.forward_tokens", "collect.batch_prompts"]
    values = {key: getattr(getattr(config, stage), key.split(".")[1]) for key in keys}
    while any(value > 1 for value in values.values()):
        # Each by turns, so that neither is lowered far more than the other.
        for key in keys:
            if values[key] > 1:
                tried[key] = values[key] = values[key] // 2
                yield key, dict(tried)


def _enough_ranks(config: Config, shape: ModelShape, machines: Machines, there: int) -> str:
    """How many GPUs would do, everything else as it is."""
    for doublings in range(1, 12):
        ranks = config.train.workers << doublings
        nodes = math.ceil(ranks / machines.gpus_per_node)
        other = changed(config, {"train.workers": ranks, "train.micro_batches_per_step": ranks})
        if memory.training(other, shape, nodes)[1].total <= there:
            return f"set train.workers={ranks} on as many GPUs"
    return "lower train.micro_batch_tokens and train.loss_chunk_tokens"


def _too_little_host_memory(
    config: Config, shape: ModelShape, machines: Machines, stage: str, workers: int, device: Need
) -> Iterator[Refusal]:
    """Refuse what does not fit the memory of a node; ``device`` is what a worker computes with where it has no GPU."""
    on_node = math.ceil(workers / machines.nodes)
    needed = on_node * (PROCESS_BYTES + device.total)
    if stage == "train":
        offloaded = memory.training(config, shape, train_nodes(config, machines))[0]
        needed = offloaded.total + on_node * device.total
    if needed > machines.host_bytes:
        setting, change = f"{'train' if stage == 'train' else 'collect'}.workers", "lower it, or free some"
        if stage == "train" and config.train.zero.offload != "none":
            setting, change = "train.zero.offload", "offload less, or spread train.workers over more nodes"
        yield Refusal(
            setting,
            f"to {stage} needs about {shown(needed)} of memory a node and {machines.name} has "
            f"{shown(machines.host_bytes)} free: {change}",
        )


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
    stored, run = memory.disk(config, shape)
    needed: dict[int, dict[str, int]] = defaultdict(dict)  # by file system
    where: dict[int, Path] = {}
    for setting, place in places.items():
        there = next(p for p in (place, *place.parents) if p.exists())
        parts = {"trajectories": stored} if setting == "store" else run.parts
        needed[there.stat().st_dev] |= parts
        where.setdefault(there.stat().st_dev, there)
    for system, parts in needed.items():
        need, free = Need(parts), shutil.disk_usage(where[system]).free
        if need.total > free:
            largest = max(parts, key=lambda part: parts[part])
            setting = {
                "trajectories": "prompts.per_round",
                "checkpoints": "train.keep_checkpoints",
                "models": "rounds",
            }[largest]
            yield Refusal(
                setting,
                f"the run needs about {shown(need.total)} of disk ({need}) and {where[system]} has {shown(free)} free: "
                f"free some, set runs_dir or store, or lower {setting}",
            )


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with dotted settings changed, not validated."""
    for key, value in changes.items():
        config = _with(config, key.split("."), value)
    return config


def _with(section: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
