"""Runs Python programs that nobody has read: in a process of their own that can do nothing but compute.

What confines a program is in ``confine.py``. A program has passed only when it ran to its last line; the proof is a
word drawn for each run and written behind that line, so an exit status of 0 alone, however it came about, is nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jf_cluster.config import SandboxConfig
from jf_cluster.evaluate.graders.confine import Confinement

SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
"""What an interpreter needs of the system, where it exists."""

FIRST_UID, UIDS = 1 << 30, 1 << 30
"""Users that programs run as where we are root: far from any that systems and containers give out."""

GRACE_S = 10.0
"""How much later than its own deadline the confining process is given up, on a machine that is very busy."""

_PROGRAM = """\
import os, sys
proof = sys.stdin.readline().strip()
sys.path += sys.argv[1:]
exec(compile(sys.stdin.read(), "<program>", "exec"), {})
os.write(1, proof.encode())
os._exit(0)
"""
"""The proof goes past ``sys.stdout``, which the program may have replaced; threads left behind are not awaited."""

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program is right or wrong for good
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """This system does not allow what confines a program; the message says why and what to change."""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error; if not, why."""

    passed: bool
    reason: str


def run(program: str, limits: SandboxConfig) -> Outcome:
    """Run a Python program; whatever it does, nothing of it is left when this returns.

    Raises:
        SandboxError: the system refuses the isolation that ``limits`` asks for.
    """
    if limits.isolation == "limits" and os.geteuid() != 0:
        raise SandboxError("sandbox.isolation=limits works for root only, who can give a program a user of its own")
    proof = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryFile() as given,
    ):
        # A file, not a pipe: a program that never reads must not keep us writing.
        given.write(f"{proof}\n{program}".encode(errors="replace"))
        given.seek(0)
        said = _confined(directory, limits, given, out, err)
        word, _, detail = said.partition(" ")
        if word == "refused":
            raise SandboxError(
                f"generated code cannot be confined here: {detail}. Allow namespaces (in a container: unshare), or, "
                "as root, accept a sandbox without network isolation: sandbox.isolation=limits"
            )
        if word == "late":
            return Outcome(False, f"not done after {limits.seconds:g} s")
        if word == "ended" and detail == "0" and _tail(out, len(proof)) == proof:
            return Outcome(True, "")
        if word != "ended":
            return Outcome(False, "its supervisor was lost")
        lines = _tail(err, 2000).strip().splitlines()
        return Outcome(False, lines[-1] if lines else f"ended early with status {detail}")


def check(limits: SandboxConfig) -> None:
    """Make sure that programs can be run here.

    Raises:
        SandboxError: they cannot, because the system refuses or the limits are too tight for an interpreter.
    """
    outcome = run("pass", limits)
    if not outcome.passed:
        raise SandboxError(f"an empty program fails in the sandbox, check the limits in sandbox: {outcome.reason}")


def _confined(directory: str, limits: SandboxConfig, given: IO[bytes], out: IO[bytes], err: IO[bytes]) -> str:
    """Start the confining process and wait; the first thing it said."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    confinement: Confinement = {
        "namespaces": limits.isolation == "namespaces",
        "uid": FIRST_UID + secrets.randbelow(UIDS),
        "root": directory,
        "readable": list(_readable(interpreter)),
        "wall_s": limits.seconds,
        "cpu_s": max(1, round(limits.seconds)),
        "memory_bytes": limits.memory_bytes,
        "processes": limits.processes,
        "file_bytes": limits.file_bytes,
        "tmpfs_bytes": 2 * limits.file_bytes,
    }
    reading, writing = os.pipe()
    with os.fdopen(reading) as report:
        try:
            process = subprocess.Popen(
                [
                    *(interpreter, "-I", "-S", "-B", str(Path(__file__).with_name("confine.py"))),
                    *(json.dumps(confinement), str(writing)),
                    # No site module: what site-packages runs at start is not for programs. -P: no imports from the cwd.
                    *(interpreter, "-s", "-S", "-B", "-P", "-c", _PROGRAM, *_packages()),
                ],
                stdin=given,
                stdout=out,
                stderr=err,
                env=_ENVIRONMENT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            process.wait(limits.seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            return "late"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        lines = report.read().splitlines()
    return lines[0] if lines else ""


@functools.cache
def _packages() -> tuple[str, ...]:
    """Installed packages, which programs may import."""
    return tuple(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")))


@functools.cache
def _readable(interpreter: str) -> tuple[str, ...]:
    """What a program sees of the file system: no path beneath another."""
    wanted = [*SYSTEM, os.path.realpath(sys.base_prefix), str(Path(interpreter).parent.parent), *_packages()]
    there = dict.fromkeys(path for path in wanted if os.path.lexists(path))
    real = [Path(path) for path in there if not Path(path).is_symlink()]
    return tuple(
        path for path in there if Path(path).is_symlink() or not any(other in Path(path).parents for other in real)
    )


def _tail(stream: IO[bytes], size: int) -> str:
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - size))
    return stream.read().decode(errors="replace")
