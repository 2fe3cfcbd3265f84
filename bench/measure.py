"""How a benchmark measures and reports: alternating runs, medians, ratios, one flat JSON object.

Needs torch, transformers and pyarrow only, so benchmarks run where Ray, DeepSpeed and MLflow are not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Value = float | int | str


def parser(description: str) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--json", type=Path, help="write the figures as one flat JSON object to this file")
    p.add_argument("--repeats", type=int, default=5, help="measured runs of each side, after one that is not counted")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Run all sides in turn, A B A B …, and give each side's wall-clock seconds; the first turn is not counted.

    Alternating means that a machine that slows down or speeds up does so for all sides alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


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


def _machine() -> dict[str, Value]:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "machine": platform.processor() or platform.machine(),
        "accelerator": accelerator,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
