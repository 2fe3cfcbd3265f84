"""A plan in the terminal: one table of what is needed and what there is, one of times and costs."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jf_cluster.config import Config
from jf_cluster.planning import memory
from jf_cluster.planning.estimate import StageTime, gpus_held, span, together_s
from jf_cluster.planning.fitting import train_nodes
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.memory import GPU_RESERVE_BYTES, PROCESS_BYTES, Need, shown
from jf_cluster.planning.shapes import ModelShape

WIDTH = 150
"""Columns where the output is not a terminal."""


def show_needs(config: Config, shape: ModelShape, machines: Machines, *, disks: bool) -> None:
    """Print what each worker, node and disk has to hold, and what it has (of disks only when they are here)."""
    gpu = f", {machines.gpus} GPUs of {shown(machines.gpu_bytes)}" if machines.gpus else ", no GPU"
    table = Table(
        title=f"{config.name} on {machines.name}: {machines.nodes} node(s), {machines.cpus} cores{gpu}\n"
        f"{config.model.path}: {shape.parameters / 1e9:,.3g} billion parameters, {config.model.dtype}, context "
        f"{shape.context_tokens}",
        title_justify="left",
    )
    for name in ("what", "needs", "of", "for"):
        table.add_column(name, justify="right" if name in ("needs", "of") else "left", overflow="fold")
    host, rank = memory.training(config, shape, train_nodes(config, machines))
    process = Need({"process": PROCESS_BYTES})
    for stage, placed, need in (
        ("collect", config.collect, memory.collecting(config, shape)),
        ("train", config.train, rank),
        ("evaluate", config.collect, memory.evaluating(config, shape)),
    ):
        if placed.gpus_per_worker:
            row = (f"{stage}, {placed.workers} workers: GPU", need, max(machines.gpu_bytes - GPU_RESERVE_BYTES, 0))
        else:
            row = (f"{stage}, {placed.workers} workers: memory", Need(need.parts | process.parts), machines.host_bytes)
        table.add_row(row[0], shown(row[1].total), shown(row[2]), str(row[1]))
    if config.train.zero.offload != "none":
        table.add_row("train: host memory of a node", shown(host.total), shown(machines.host_bytes), str(host))
    stored, run = memory.disk(config, shape)
    longest = "trajectories, if every response were as long as it may be"
    for setting, need, place, parts in (
        ("runs_dir", run.total, str(config.run_dir), str(run)),
        ("store", stored, config.store_url, longest),
    ):
        free = shown(_free(Path(place))) if disks and "://" not in place else ""
        table.add_row(f"disk: {setting}", shown(need), free, parts)
    _console().print(table)


def show_times(config: Config, stages: list[StageTime], price: float | None) -> None:
    """Print the time of every kind of stage, and costs where a price is given."""
    gpus = gpus_held(config)
    table = Table()
    for name in ("stage", "times", "each", "together", *(["cost"] if price is not None else [])):
        table.add_column(name, justify="left" if name == "stage" else "right")

    def costs(seconds: float) -> list[str]:
        return [] if price is None else [f"{seconds / 3600 * gpus * price:,.2f}"]

    for stage in stages:
        table.add_row(stage.name, str(stage.count), span(stage.seconds), span(stage.total_s), *costs(stage.total_s))
    total = together_s(config, stages)
    table.add_row("all", "", "", span(total), *costs(total), style="bold")
    _console().print(table)


def _free(place: Path) -> int:
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def _console() -> Console:
    console = Console()
    return Console(width=console.width if console.is_terminal else WIDTH)
