"""Open, being sealed, sealed: a round's state, in one file that only changes by compare-and-swap.

The file is ``manifest.json``: absent or ``{"unsealed": "open", ...}`` while the round is open,
``{"unsealed": "sealing", ...}`` while somebody builds the manifest, and then the manifest.

A sealer announces itself before it lists shards, and its manifest replaces only the announcement it began with. A
writer that has published a shard withdraws any announcement it finds, so that the sealer has to list again. Hence a
shard whose commit succeeded is in the manifest; nobody waits for anybody, and whoever is killed leaves nothing in the
way: an announcement of a dead sealer is taken over by the next one.
"""

from __future__ import annotations

import json
import secrets
from typing import Literal

from trajectory_store.errors import MissingShardError
from trajectory_store.folder import Folder

MANIFEST_NAME = "manifest.json"
Stage = Literal["open", "sealing", "sealed"]


def stage_of(content: bytes | None) -> Stage:
    """What the file's content says; whatever is no state (a damaged manifest too) counts as a manifest."""
    if content is None or content.startswith(b'{"unsealed": "open"'):
        return "open"
    return "sealing" if content.startswith(b'{"unsealed": "sealing"') else "sealed"


def look(folder: Folder) -> bytes | None:
    """The state file's content, None when there is none."""
    try:
        return bytes(folder.read(MANIFEST_NAME))
    except MissingShardError:
        return None


def announce_seal(folder: Folder) -> bytes | None:
    """Announce that shards are about to be listed; what a manifest may replace then, or None once sealed."""
    while True:
        found = look(folder)
        stage = stage_of(found)
        if stage == "sealed":
            return None
        if stage == "sealing":
            return found  # somebody else's, alive or dead: the first manifest to replace it counts
        announcement = _state("sealing")
        if _change(folder, found, announcement):
            return announcement


def withdraw_seal(folder: Folder) -> bool:
    """Make whoever is sealing list shards again; True when it is too late, the round being sealed."""
    while True:
        found = look(folder)
        stage = stage_of(found)
        if stage != "sealing":
            return stage == "sealed"
        if _change(folder, found, _state("open")):
            return False


def _state(stage: Literal["open", "sealing"]) -> bytes:
    # Never the same twice: a sealer must notice that its announcement was withdrawn even if another was made since.
    return json.dumps({"unsealed": stage, "token": secrets.token_hex(8)}).encode()


def _change(folder: Folder, found: bytes | None, state: bytes) -> bool:
    return folder.create(MANIFEST_NAME, state) if found is None else folder.replace(MANIFEST_NAME, found, state)
