"""What an error says, in one line: libraries add stacks and tracebacks of other processes to their messages, and URLs
with the passwords in them.
"""

from __future__ import annotations

from trajectory_store import without_secrets


def first_line(error: BaseException) -> str:
    """The first line that says something, or the kind of error where none does."""
    return next(iter(_lines(error)), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line; of a remote traceback the one that names the exception."""
    return next(reversed(_lines(error)), type(error).__name__)


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in without_secrets(str(error)).splitlines() if line.strip()]
