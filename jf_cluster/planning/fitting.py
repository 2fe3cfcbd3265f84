"""Whether a run's stages fit the machines, GPUs and memory, and the settings under which they would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jf_cluster.config import Config
from jf_cluster.planning import memory
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.memory import GPU_RESERVE_BYTES, PROCESS_BYTES, Need, shown
from jf_cluster.planning.shapes import ModelShape

OFFLOADS = ("none", "optimizer", "all")
"""Values of train.zero.offload, from none of the memory to most of it."""


@dataclass(frozen=True)
class Refusal:
    """Why a run cannot work, and the setting to change."""

    setting: str
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


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
    together = config.needs("gpus_per_worker")
    if config.overlap == "pipelined" and together > machines.gpus:
        yield Refusal(
            "overlap",
            f"pipelined rounds collect and train at once, for which the workers need {math.ceil(together)} GPUs and "
            f"{machines.name} has {machines.gpus}: set overlap=alternate, lower collect.workers or train.workers, or "
            "add GPUs",
        )


def idle_gpus(config: Config, machines: Machines) -> str | None:
    """Say which stages leave GPUs of these machines without work, or None."""
    used = {
        f"{stage}.workers": min(machines.gpus, math.ceil(placed.workers * placed.gpus_per_worker))
        for stage, placed in (("collect", config.collect), ("train", config.train))
    }
    if config.overlap == "pipelined":
        used = {" and ".join(used): min(machines.gpus, sum(used.values()))}
    idle = {setting: count for setting, count in used.items() if count < machines.gpus}
    if not idle or config.model.path == "tiny":  # the embedded run is for a CPU
        return None
    told = ", ".join(f"{setting} uses {count}" for setting, count in idle.items())
    return (
        f"of the {machines.gpus} GPUs of {machines.name} some stay idle ({told}): set more workers "
        "(gpus_per_worker above 0, train.micro_batches_per_step a multiple of train.workers) or take fewer GPUs"
    )


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
