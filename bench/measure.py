"""How a benchmark measures and reports: alternating runs, medians, ratios, one flat JSON object.

Needs torch, transformers and pyarrow only, so benchmarks run where Ray, DeepSpeed and MLflow are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

Value = float | int | str

Settings = TypeVar("Settings")
"""A frozen dataclass whose fields are numbers, words or tuples of them."""


def parser(description: str) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--json", type=Path, help="write the figures as one flat JSON object to this file")
    p.add_argument("--repeats", type=int, default=5, help="measured runs of each side, after one that is not counted")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def add_flags(p: argparse.ArgumentParser, defaults: Settings) -> None:
    """A flag for every field of ``defaults``; ``from_flags`` reads them."""
    hints = get_type_hints(type(defaults))
    for f in fields(defaults):  # type: ignore[arg-type]
        value, kind = getattr(defaults, f.name), get_origin(hints[f.name])
        parts = get_args(hints[f.name])
        many = None if kind is not tuple else "+" if parts[-1] is ... else len(parts)
        p.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=type(value[0] if many else value),
            nargs=many,
            choices=parts if kind is Literal else None,
            default=value,
            help=f"of {type(defaults).__name__}",
        )


def from_flags(args: argparse.Namespace, defaults: Settings) -> Settings:
    """``defaults`` with what was given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(defaults)}  # type: ignore[arg-type]
    return replace(defaults, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})  # type: ignore[type-var]


def use_threads(threads: int) -> None:
    """Compute with so many threads and take numbers too small for a normal float as zero, as the project's workers do.

    It holds for all sides: a trained model's probabilities become denormal, and a CPU is many times slower at those.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def busy_clock(device: str) -> Callable[[], float]:
    """The clock to measure computation with: CPU time where one thread computes, as other work may share the cores."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def alternate(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run all sides in turn, A B A B …, and give each side's seconds by ``clock``; the first turn is not counted.

    Alternating means that a machine that slows down or speeds up does so for all sides alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begun = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - begun)
    return seconds


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module-level function gives in a new process, whose memory nothing has used yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory ``run`` holds above what was held before: the allocator's count on a GPU, else the resident set."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    before, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        stop.set()
        watcher.join()
    return peak[0] - before


def _return_freed_memory() -> None:
    """Have glibc map every larger tensor by itself, so that the resident set is what is alive."""
    with contextlib.suppress(AttributeError, OSError):  # another C library: the resident set as it is
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD; setting it also stops glibc from raising it


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the pairwise ratios of two alternated series."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def median(series: list[float]) -> float:
    return statistics.median(series)


def report(name: str, figures: Mapping[str, Value], json_path: Path | None) -> None:
    """Print the figures as a table and, where asked, write them with the machine and versions as flat JSON."""
    rows: dict[str, Value] = {**figures, **_machine()}
    width = max(map(len, rows))
    print(f"{name}")
    for key, value in rows.items():
        print(f"  {key:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {key:<{width}}  {value}")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


MACHINE = ("machine", "accelerator", "torch", "threads", "date")
"""Keys of ``report`` that say where and when it was measured."""


def _machine() -> dict[str, Value]:
    from jf_cluster.jacobi.calibration import processor  # here, as the children whose memory is measured need it not

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "accelerator": accelerator,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
