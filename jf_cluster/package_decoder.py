"""Giving an exported model its decoder: ``custom_generate/`` with copies of the modules it needs.

The copies are the decoder itself, found by following its imports, with ``jf_cluster.jacobi.x`` made ``.x``; so there is
one decoder, not two. They import torch, numpy and transformers only, and run where this project is not installed.
"""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parent / "jacobi"
ENTRY = "transformers_generate"
FOLDER = "custom_generate"

_IMPORT = re.compile(r"^(\s*from )jf_cluster\.jacobi\.(\w+)( import )", flags=re.MULTILINE)


def write_decoder(target: Path) -> list[Path]:
    """Write ``custom_generate/`` into the model directory ``target``; gives the files, ``generate.py`` first."""
    folder = target / FOLDER
    folder.mkdir(exist_ok=True)
    files = []
    for name in _needed():
        source = (PACKAGE / f"{name}.py").read_text()
        file = folder / ("generate.py" if name == ENTRY else f"{name}.py")
        file.write_text(_IMPORT.sub(r"\1.\2\3", source))
        files.append(file)
    return files


def _needed() -> list[str]:
    """Names of the modules the decoder consists of, the entry first."""
    found = [ENTRY]
    for name in found:  # grows while it is walked
        found += [m[1] for m in _IMPORT.findall((PACKAGE / f"{name}.py").read_text()) if m[1] not in found]
    return list(dict.fromkeys(found))
