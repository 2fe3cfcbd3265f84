"""A copy of the repository like a clone after ``make``: with a ``.venv`` of its own, of this environment's packages."""

from __future__ import annotations

import os
import shutil
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make_clone(target: Path) -> Path:
    """Copy what is in the repository to ``target`` and give it an environment that imports the copy, not ROOT."""
    left = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".venv", "runs", ".hypothesis", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=left)
    environment = target / ".venv"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    # Read in alphabetical order: where packages are, then what make adds (see the Makefile).
    (site_packages / "a_clone.pth").write_text("\n".join([str(target), *packages]) + "\n")
    (site_packages / "jf_cluster_startup.pth").write_text("import jf_cluster.startup\n")
    for program in Path(sys.executable).parent.iterdir():
        copy = environment / "bin" / program.name
        if program.is_file() and not copy.exists():
            _copy_program(program, copy)
    (environment / "ready").touch()  # what make would install is there
    return target


def _copy_program(program: Path, copy: Path) -> None:
    """One whose first line names this Python must name the clone's."""
    content = program.read_bytes()
    first, newline, rest = content.partition(b"\n")
    if first.startswith(b"#!") and first[2:].strip().startswith(os.fsencode(Path(sys.executable).parent)):
        first = b"#!" + os.fsencode(copy.with_name("python"))
        copy.write_bytes(first + newline + rest)
        copy.chmod(0o755)
    else:
        copy.symlink_to(program)


def fresh_shell(clone: Path) -> dict[str, str]:
    """The variables of a new shell with nothing but the clone's ``.venv`` activated."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | {"PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.defpath}", "VIRTUAL_ENV": str(clone / ".venv")}
