"""Who can reach what listens: this machine alone on loopback; anything wider without authentication is warned of."""

from __future__ import annotations

import ipaddress
import logging

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def warn_if_open(what: str, host: str, fix: str) -> None:
    """Warn once that others can use ``what``, which asks nobody who they are, where ``host`` lets other machines in."""
    if not is_loopback(host):
        logger.warning(
            "%s listens on %s without authentication: whoever reaches this machine can use it; %s", what, host, fix
        )
