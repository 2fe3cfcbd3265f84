"""``python -m bench.ablate``: what each choice of the recipe is worth on the tiny model, as a table in the docs.

Every cell (a recipe and a seed) trains one start model through its rounds in one process and leaves a JSON file, so an
interrupted ablation goes on where it stopped; ``--only`` and several processes on one directory share the cells. The
table is made from whatever cells are there. Cells start from the embedded run's first round where ``make train`` made
one: the base has to be trained some hundred steps before recipes differ (docs/tiny.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoTokenizer

from bench import tiny_inputs
from bench.ablation import Effort, Outcome, Recipe, evaluate, run_cell
from bench.measure import add_flags, from_flags, use_threads

DEFAULT = Recipe()
VARIANTS: dict[str, dict[str, Recipe]] = {
    "window, blocks": {
        "1": DEFAULT,
        **{str(w): replace(DEFAULT, window=w) for w in (2, 4, 16)},
        "whole response": replace(DEFAULT, window=0),
    },
    "schedule (window 4)": {
        s: replace(DEFAULT, window=4, schedule=s) for s in ("progressive", "reverse", "random", "constant")
    },
    "next-token weight": {f"{w:g}": replace(DEFAULT, ar_weight=w) for w in (5.0, 10.0, 20.0, 40.0)},
    "block size by round": {
        "16, 16": DEFAULT,
        "8, 16": replace(DEFAULT, block_sizes=(8, 16)),
        "16, 32": replace(DEFAULT, block_sizes=(16, 32)),
        "32, 32": replace(DEFAULT, block_sizes=(32, 32)),
    },
    "trajectories": {"regenerated": DEFAULT, "reused": replace(DEFAULT, trajectories="reused")},
    "responses": {w: replace(DEFAULT, responses=w) for w in ("base", "self", "verified")},
}

MOST_SEEDS = 10


class DirectoryOfAnotherRunError(ValueError):
    """What was made with other settings lies there; mixing it would make the results wrong."""


def cell_name(recipe: Recipe, seed: int) -> str:
    """File name of a cell: what differs from the default, and the seed."""
    parts = [
        f"{f.name}-{'_'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for f in fields(recipe)
        if (value := getattr(recipe, f.name)) != f.default
    ]
    return "+".join([*parts, f"seed-{seed}"]) if parts else f"default+seed-{seed}"


def wanted(seeds: int) -> Iterator[tuple[Recipe, int]]:
    """Every distinct cell, the first seed of all of them first."""
    recipes = dict.fromkeys(recipe for variants in VARIANTS.values() for recipe in variants.values())
    return ((recipe, seed) for seed in range(seeds) for recipe in recipes)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Appear whole or not at all: a cell cut by a kill is made again."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)


def read_outcome(path: Path) -> Outcome:
    content = json.loads(path.read_text())["outcome"]
    return Outcome(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})


def open_directory(directory: Path, settings: Mapping[str, Any]) -> Path:
    """A directory for results, with the settings they are made with noted in it.

    Raises:
        DirectoryOfAnotherRunError: it was begun with other settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / "effort.json"
    mine = json.loads(json.dumps(settings))
    if not note.exists():
        write_json(note, mine)
    elif (there := json.loads(note.read_text())) != mine:
        raise DirectoryOfAnotherRunError(f"{directory} holds what was made with {there}, not {mine}: name another")
    return directory


Measured = tuple[float, float]
"""Tokens per forward and share of right answers."""


def section(cells: Path) -> list[str]:
    """The tables of one directory of cells, one a choice: means over the seeds that are there."""
    effort = json.loads((cells / "effort.json").read_text())
    models = json.loads((cells / "models.json").read_text())
    base, start = (models[name] for name in ("base", "start"))
    lines = [
        f"## {effort['prompts']} prompts and {effort['steps']} steps a round",
        "",
        f"{len(DEFAULT.block_sizes)} rounds of {effort['prompts']} fresh prompts and {effort['steps']} steps of "
        f"{effort['step_tokens']} tokens, learning rate {effort['learning_rate']:g}; decoded block after block at n = "
        f"{effort['decoding_block']} on {effort['held_out']} held-out problems. All start from the same model, with "
        f"{start[0]:.2f} tokens per forward and {start[1]:.1%} right answers; the base has {base[0]:.2f} and "
        f"{base[1]:.1%}.",
        "",
    ]
    for choice, variants in VARIANTS.items():
        rows = [
            f"| {name}{' (default)' if recipe == DEFAULT else ''} | {_figures(found, base)} |"
            for name, recipe in variants.items()
            if (found := _outcomes(cells, recipe))
        ]
        if len(rows) > 1:
            lines += [
                f"| {choice} | TPF | range | accuracy | range | consistency, nats | TPF gained per point | "
                "after round 1 | seeds |",
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
                *rows,
                "",
            ]
    return lines


def page(directories: Sequence[Path]) -> str:
    """The page of docs."""
    lines = [
        "# Ablation on the tiny model",
        "",
        "Made by `python -m bench.ablate`. *TPF gained per point* is what tokens per forward rose over the base's for "
        "each percentage point of accuracy below the base's (at least half a point is counted: fewer cannot be told "
        "apart on so few problems). Ranges are over seeds, which choose the prompts, the guesses and the noise. The "
        f"default is window {DEFAULT.window}, noise ratio from {DEFAULT.t_min:g} to 1, next-token weight "
        f"{DEFAULT.ar_weight:g}, n = {DEFAULT.block_sizes[0]}, {DEFAULT.trajectories} trajectories and responses by "
        f"the {DEFAULT.responses}.",
        "",
    ]
    return "\n".join([*lines, *(line for directory in directories for line in section(directory))])


def _outcomes(cells: Path, recipe: Recipe) -> list[Outcome]:
    paths = (cells / f"{cell_name(recipe, seed)}.json" for seed in range(MOST_SEEDS))
    return [read_outcome(path) for path in paths if path.exists()]


def _figures(found: list[Outcome], base: Measured) -> str:
    speeds, right = [o.tpf for o in found], [o.accuracy for o in found]
    lost = max(0.5, 100 * (base[1] - mean(right)))
    return " | ".join(
        [
            f"{mean(speeds):.2f}",
            f"{min(speeds):.2f} to {max(speeds):.2f}",
            f"{mean(right):.1%}",
            f"{min(right):.1%} to {max(right):.1%}",
            f"{mean(o.consistency for o in found):.2f}",
            f"{(mean(speeds) - base[0]) / lost:.2f}",
            f"{mean(o.tpf_by_round[0] for o in found):.2f}, {mean(o.accuracy_by_round[0] for o in found):.1%}",
            str(len(found)),
        ]
    )


def _digest_of(model: str) -> str:
    """What tells a model's weights from another's of the same name."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cells", type=Path, required=True, help="directory of the cells' JSON files")
    p.add_argument("--also", type=Path, nargs="*", default=[], help="directories whose tables follow on the page")
    p.add_argument("--table", type=Path, default=Path("docs/ablation.md"), help="the page")
    p.add_argument("--model", default=str(tiny_inputs.TINY), help="the base")
    first = tiny_inputs.RUN / "round-001"
    p.add_argument("--start", default=str(first if first.exists() else tiny_inputs.TINY), help="what cells start from")
    p.add_argument("--seeds", type=int, default=2, choices=range(1, MOST_SEEDS + 1))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--only", help="run only cells whose name contains this")
    p.add_argument("--at-most", type=int, help="run at most so many cells now")
    add_flags(p, Effort())
    args = p.parse_args()
    use_threads(args.threads)
    effort = from_flags(args, Effort())
    cells = open_directory(args.cells, {**asdict(effort), "start": _digest_of(args.start)})
    model, start = (tiny_inputs.load(path, "cpu") for path in (args.model, args.start))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not (cells / "models.json").exists():
        write_json(
            cells / "models.json",
            {"base": evaluate(model, tokenizer, effort), "start": evaluate(start, tokenizer, effort)},
        )
    ran = 0
    for recipe, seed in wanted(args.seeds):
        name = cell_name(recipe, seed)
        path = cells / f"{name}.json"
        if path.exists() or (args.only and args.only not in name) or ran == args.at_most:
            continue
        outcome = run_cell(model, start, tokenizer, recipe, effort, seed)
        write_json(path, {"recipe": asdict(recipe), "seed": seed, "outcome": asdict(outcome)})
        ran += 1
        print(f"{name}: TPF {outcome.tpf:.2f}, accuracy {outcome.accuracy:.1%}, {outcome.cpu_s:.0f} s", flush=True)
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(page([cells, *args.also]))


if __name__ == "__main__":
    main()
