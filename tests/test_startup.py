"""What `.venv` does whenever Python starts: fewer looks at what imports made, and the usual ones where work is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jf_cluster.startup import IMPORTING

SHIPPED = Path(__file__).parent.parent / "jf_cluster" / "tiny" / "base"
LOADS = f"""
import gc
import jf_cluster.startup
importing = gc.get_threshold()
from jf_cluster.models import load_checkpoint
load_checkpoint({str(SHIPPED)!r})
print(importing[0], gc.get_threshold()[0], gc.get_freeze_count() > 100_000)
"""


def test_the_collector_looks_seldom_until_a_model_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-S", "-c", "import gc; print(gc.get_threshold()[0])"], capture_output=True)
    loaded = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True)
    assert loaded.stdout.split() == [str(IMPORTING), done.stdout.decode().strip(), "True"], loaded.stderr
