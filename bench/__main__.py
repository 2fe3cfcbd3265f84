"""``python -m bench``: every benchmark that runs in this environment, one after the other, with its CPU preset.

``--page FILE`` also writes all figures as a page of documentation.
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
from pathlib import Path

from bench.measure import MACHINE

NOT_BENCHMARKS = {
    *("__init__", "__main__", "ablate", "ablation", "gpu", "many_prompts", "mds", "measure", "published", "simulated"),
    "tiny_inputs",
}
"""Parts of benchmarks; the ablation, which takes hours and a directory for its cells; the list for a GPU."""

NEEDS = {"planning": "ray", "scale": "ray"}
"""What the environment must have for a benchmark to be run; the machines with GPUs have torch and no Ray."""

_HEAD = """# Benchmarks

Made by `python -m bench --page docs/benchmarks.md` (`make bench` prints the same figures). Every benchmark runs the
alternative beside ours, in the same process or in turn; what counts are the ratios. `ratio_a_vs_b` is ours against b;
`median_…` are medians over the repeats. None of it ran on a GPU unless its `accelerator` says so.
"""


def page(results: dict[str, dict[str, object]]) -> str:
    """Figures by benchmark as Markdown: what is measured, from the module's docstring, and a table."""
    parts = [_HEAD]
    for name, figures in results.items():
        about = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text())) or ""
        machine = ", ".join(f"{key} {figures[key]}" for key in MACHINE if key in figures)
        parts += [
            f"## {name}",
            "",
            about.replace("``", "`"),
            "",
            f"*{machine}*",
            "",
            "| figure | value |",
            "| --- | --- |",
        ]
        for key, value in figures.items():
            if key not in MACHINE:
                parts.append(f"| `{key}` | {f'{value:.4g}' if isinstance(value, float) else value} |")
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--page", type=Path, help="write all figures to this Markdown file")
    args = p.parse_args()
    failed, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(Path(__file__).parent.glob("*.py")):
            if path.stem in NOT_BENCHMARKS:
                continue
            if path.stem in NEEDS and importlib.util.find_spec(NEEDS[path.stem]) is None:
                print(f"{path.stem}: left out, there is no {NEEDS[path.stem]} here", file=sys.stderr)
                continue
            figures = Path(folder, f"{path.stem}.json")
            quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
            if subprocess.run(
                [sys.executable, "-m", f"bench.{path.stem}", "--json", str(figures)], env=quiet
            ).returncode:
                failed.append(path.stem)
            else:
                results[path.stem] = json.loads(figures.read_text())
    if args.page is not None:
        args.page.write_text(page(results))
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
