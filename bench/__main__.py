"""``python -m bench``: every benchmark that runs in this environment, one after the other, with its CPU preset.

``python -m bench NAME …`` runs only those named. ``--page FILE`` also writes the figures as a page of documentation;
what was not run keeps the section that the file has. The figures that the pages beside it quote are then made anew too.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.measure import MACHINE
from bench.quotes import figures_of, requoted

NOT_BENCHMARKS = {
    *("__init__", "__main__", "ablate", "ablation", "end_to_end", "gpu", "many_prompts", "mds", "measure", "published"),
    *("quotes", "simulated", "tiny_inputs"),
}
"""Parts of benchmarks; what takes long and a directory for its results, the ablation and end to end; a GPU's list."""
BENCHMARKS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_BENCHMARKS)

NEEDS = {"planning": "ray", "scale": "ray"}
"""What the environment must have for a benchmark to be run; the machines with GPUs have torch and no Ray."""

_HEAD = """# Benchmarks

Made by `python -m bench --page docs/benchmarks.md`; with names, as in `python -m bench decode --page …`, only their
sections are made anew. `make bench` prints the same figures. Every benchmark runs the alternative beside ours, in the
same process or in turn; what counts are the ratios. `ratio_a_vs_b` is ours against b; `median_…` are medians over the
repeats. None of it ran on a GPU unless its `accelerator` says so.
"""
_NOT_RUN = "*Its figures are not on this page yet.*\n"


def about(name: str) -> str:
    """What a benchmark measures, from its docstring, as Markdown."""
    docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
    return docstring.replace("``", "`")


def section(figures: Mapping[str, object]) -> str:
    """A benchmark's figures as Markdown: the machine, and a table."""
    machine = ", ".join(f"{key} {figures[key]}" for key in MACHINE if key in figures)
    rows = [
        f"| `{key}` | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for key, value in figures.items()
        if key not in MACHINE
    ]
    return "\n".join([f"*{machine}*", "", "| figure | value |", "| --- | --- |", *rows, ""])


def page(results: Mapping[str, Mapping[str, object]], before: str = "") -> str:
    """A section for every benchmark: its figures where there are new ones, else those of the page ``before``."""
    kept = {}
    for part in before.split("\n## ")[1:]:
        name, _, text = part.partition("\n")
        begin = text.find("\n*machine ") + 1
        kept[name] = text[begin:].rstrip() + "\n" if begin else _NOT_RUN
    parts = [_HEAD]
    for name in BENCHMARKS:
        made = section(results[name]) if name in results else kept.get(name, _NOT_RUN)
        parts += [f"## {name}\n\n{about(name)}\n\n{made}"]
    return "\n".join(parts)


def publish(path: Path, results: Mapping[str, Mapping[str, object]]) -> None:
    """Write the page and make anew what the pages beside it quote; say what changed there."""
    text = page(results, path.read_text() if path.exists() else "")
    path.write_text(text)
    for other in sorted(path.parent.glob("*.md")):
        now, changes = requoted(other.read_text(), figures_of(text))
        if changes:
            other.write_text(now)
            print(f"{other}, whose words must still be true: " + "; ".join(changes), file=sys.stderr)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run, by default all: {', '.join(BENCHMARKS)}"
    )
    p.add_argument("--page", type=Path, help="write the figures to this Markdown file")
    args = p.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        p.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    failed, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or BENCHMARKS:
            if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
                print(f"{name}: left out, there is no {NEEDS[name]} here", file=sys.stderr)
                continue
            figures = Path(folder, f"{name}.json")
            quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
            if subprocess.run([sys.executable, "-m", f"bench.{name}", "--json", str(figures)], env=quiet).returncode:
                failed.append(name)
                continue
            results[name] = json.loads(figures.read_text())
            if args.page is not None:  # after each one, since all of them together take long
                publish(args.page, results)
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
