"""``python -m bench``: every benchmark that runs in this environment, one after the other, with its CPU preset."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOT_BENCHMARKS = {"__init__", "__main__", "ablate", "ablation", "mds", "measure", "published", "tiny_inputs"}
"""Parts of benchmarks, and the ablation, which takes an hour and a directory for its cells."""


def main() -> int:
    failed = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_BENCHMARKS and subprocess.run([sys.executable, "-m", f"bench.{path.stem}"]).returncode:
            failed.append(path.stem)
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
