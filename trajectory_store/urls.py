"""The parts of a URL, and what may be shown of it: all but the names, passwords and keys that may be in it."""

from __future__ import annotations

import re

# The second form is a password whose slash nobody encoded: no URL, but the error that says so repeats it.
_USER = re.compile(r"""(?<=://)(?:[^\s/?#"<>]*|[^\s/?#"<>:@\[]*:(?!\d+[/?#])[^\s"<>]*)@""")
_VALUE = re.compile(
    r"""(?<=[?&;])([\w.-]*(?:secret|passw)[\w.-]*|[\w.-]*(?:token|signature|credential|api[_-]?key)"""
    r"""|[\w.-]*access[_-]?key(?:[_-]?id)?|sig|key|pass|pwd|odbc_connect)=[^\s&#"<>]*""",
    re.IGNORECASE,
)
_CONTAINER_FIRST = ("abfs://", "abfss://", "wasb://", "wasbs://")
"""On Azure the container stands before the ``@``, with the key behind a colon."""


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs in it, without what gives access: user names and passwords are left out, values of
    parameters like ``secret_key`` are ``***``.

    What is left still names the place: with credentials from the environment it is the same store.
    """
    return _VALUE.sub(r"\1=***", _USER.sub(_container, text))


def parted(url: str) -> tuple[str, str]:
    """The address of a store and the parameters behind it, their ``?`` included; a local path has none."""
    address, query, parameters = url.partition("?") if "://" in url else (url, "", "")
    return address.rstrip("/"), query + parameters


def _container(match: re.Match[str]) -> str:
    container = match[0].rstrip("@").partition(":")[0]
    return f"{container}@" if container and match.string[: match.start()].endswith(_CONTAINER_FIRST) else ""
