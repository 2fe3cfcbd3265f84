"""The atomic steps of a local disk: a file that appears whole, appears only once, or replaces just what was expected.

Files are written under a temporary name that says which process writes them, flushed to disk, then renamed or linked
into place; the folder is flushed too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trajectory_store.errors import StoreUnavailableError

TEMPORARY_PREFIX = ".tmp-"
NOT_OFFERED = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.ENOLCK)
"""What network file systems answer that have no hard links or no locks."""


def publish_file(target: Path, content: Any) -> None:
    """Make `content` appear as `target` in one step, replacing what was there."""
    write_temporary(target, content).replace(target)
    sync(target.parent)


def create_file(target: Path, content: Any) -> bool:
    """Publish only if there is no `target`; of simultaneous creators exactly one is told True."""
    temporary = write_temporary(target, content)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if target.exists():  # the other creator has swept the folder already, our temporary file with it
            return False
        raise
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        if target.exists():  # without hard links a check before the rename is the best there is
            return False
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)
    return True


def replace_file(target: Path, expected: bytes, content: Any) -> bool:
    """Publish only if `target` holds `expected`; of simultaneous callers with the same expectation exactly one wins."""
    while True:
        try:
            held = target.open("r+b")
        except FileNotFoundError:
            return False
        with held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX)  # let go of by the kernel when this process dies
            except OSError as error:
                if error.errno not in NOT_OFFERED:
                    raise
            if os.fstat(held.fileno()).st_ino != target.stat().st_ino:
                continue  # replaced while we waited for the lock: that was a lock on the past
            if held.read() != expected:
                return False
            publish_file(target, content)
            return True


def write_temporary(target: Path, content: Any) -> Path:
    """`content`, flushed to disk, in a temporary file beside `target`; no file is left when that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(temporary_name(target.name))
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def sync(path: Path) -> None:
    """Flush a file, or a folder: without that a power cut may forget a rename although the file was flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary local path to write to; it becomes `target` when the block ends well and is removed otherwise.

    Raises:
        StoreUnavailableError: the file cannot be written.
    """
    if target.is_dir():  # said before the work is done
        raise StoreUnavailableError(f"cannot write {target}: it is a folder; name a file in it")
    temporary = target.with_name(temporary_name(target.name))
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        if isinstance(error, StoreUnavailableError):
            raise
        raise StoreUnavailableError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def host_name() -> str:
    """This machine's name, reduced to what file names and ids may hold."""
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40] or "host"


def is_orphan(name: str) -> bool:
    """Whether a temporary file belongs to a process of this machine that no longer runs."""
    host, _, rest = name.removeprefix(TEMPORARY_PREFIX).partition("-")
    process_id, _, _ = rest.partition("-")
    if host != host_name() or not process_id.isdigit():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def temporary_name(name: str) -> str:
    """A name that nobody else uses and that says whose it is."""
    return f"{TEMPORARY_PREFIX}{host_name()}-{os.getpid()}-{secrets.token_hex(4)}-{name}"
