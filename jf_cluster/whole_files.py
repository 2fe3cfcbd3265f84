"""Small files that appear whole or not at all, and errors of a full disk that say which file found no room.

What the store writes is in `trajectory_store.local_files`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trajectory_store.local_files import sync

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM_BYTES = 1 << 20
"""A library that lost the system's reason failed for want of room where less than this is left."""


def write_whole(path: Path, text: str | bytes) -> None:
    """Make ``text`` appear as ``path`` in one step, replacing what was there; its folder is made.

    Raises:
        OSError: it cannot be written; names the file. What was there before is untouched and nothing else is left.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # others may write it as well
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(text if isinstance(text, bytes) else text.encode())
        sync(draft)  # or a power cut may leave the new name with nothing in it
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def named_when_full(place: Path) -> Iterator[None]:
    """Turn whatever a library makes of a full disk while it writes to ``place`` into an OSError that names it.

    torch.save raises a RuntimeError about its archive, safetensors an error of its own, and a failed write to an open
    file says nothing of which.
    """
    try:
        yield
    except Exception as error:
        if not _means_full(error, place):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


def is_full(error: BaseException) -> bool:
    """Whether the system said that there is no room."""
    return isinstance(error, OSError) and error.errno in FULL


def _means_full(error: Exception, place: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return is_full(error)
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    there = next(p for p in (place, *place.parents) if p.exists())
    return shutil.disk_usage(there).free < NO_ROOM_BYTES
