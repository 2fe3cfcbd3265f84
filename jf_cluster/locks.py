"""Locks that keep other processes from the same files, on all machines that share the file system."""

from __future__ import annotations

import fcntl
import logging
import os
from typing import TextIO

from trajectory_store.local_files import NOT_OFFERED

logger = logging.getLogger(__name__)

_told: set[int] = set()
"""Devices without locks that were warned of: a run has several locks."""


def lock(file: TextIO, *, wait: bool = True) -> None:
    """Lock an open file until it is closed; one warning says so where its file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # Lustre mounted without -o flock has none
        if error.errno not in NOT_OFFERED:
            raise
        device = os.fstat(file.fileno()).st_dev
        if device not in _told:
            _told.add(device)
            logger.warning(
                "%s cannot be locked on this file system (%s): nothing keeps a second process from working on the same "
                "run, so start only one at a time",
                *(file.name, error.strerror),
            )
