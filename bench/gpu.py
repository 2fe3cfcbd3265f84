"""``python -m bench.gpu``: everything that claims a GPU, on one, in under nine minutes; the figures as one JSON file.

Needs torch, transformers and pyarrow only. Decoding and collecting take random weights at Qwen2.5's shapes, as shapes
decide the time. A benchmark that fails or runs out of time is named and the others go on. What trains a model on the
GPU and then has it decode is a command of its own, ``python -m bench.end_to_end``: about 20 minutes, in as many calls
as one likes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LIST: dict[str, list[str]] = {
    "attention": ["attention", "--repeats", "3"],
    "decode_7b": [
        "decode", "--model", "qwen2.5-7b", "--prompts", "2", "--max-new-tokens", "48", "--block-sizes", "16", "64",
        "--repeats", "1",
    ],
    "decode_1.5b": [
        "decode", "--model", "qwen2.5-1.5b", "--prompts", "2", "--max-new-tokens", "48", "--block-sizes", "16", "64",
        "128", "--repeats", "1",
    ],
    "collect_1.5b": [
        "collect", "--model", "qwen2.5-1.5b", "--prompts", "64", "--published-prompts", "1", "--max-new-tokens", "256",
        "--forward-tokens", "65536", "--repeats", "1",
    ],
    "train_step_1.5b": [
        "train_step", "--model", "qwen2.5-1.5b", "--samples", "8", "--response-tokens", "1024",
        "--long-response-tokens", "0",
        "--micro-batch-tokens", "16384", "--repeats", "2",
    ],
    "loss": ["loss", "--repeats", "3"],
    "roofline_1.5b": [
        "roofline", "--model", "qwen2.5-1.5b", "--samples", "16", "--response-tokens", "512", "--context", "1024",
        "--drafts", "1", "16", "64", "256", "--forward-tokens", "65536", "--micro-batch-tokens", "16384",
        "--repeats", "2",
    ],
}  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--json", type=Path, help="write all figures to this file, one object a benchmark")
    p.add_argument("--limit-s", type=float, default=520, help="seconds for all of them")
    p.add_argument("--only", nargs="+", choices=LIST, default=list(LIST))
    args = p.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no GPU here; python -m bench runs the CPU presets", file=sys.stderr)
        return 2
    begun, failed, found = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            figures = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", f"bench.{LIST[name][0]}", *LIST[name][1:], "--json", str(figures)]
            try:
                subprocess.run(command, check=True, timeout=max(1.0, args.limit_s - (time.monotonic() - begun)))
                found[name] = json.loads(figures.read_text())
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append(f"{name}: {error}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
