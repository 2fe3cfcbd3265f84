"""Which model, tokenizer, block size, seed and code a round's trajectories come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trajectory_store.errors import ProvenanceMismatchError

IDENTITY = ("model_hash", "tokenizer_hash", "block_size", "seed", "round_number")
"""The fields in which all rows of a round agree; code version and configuration may change between restarts."""


@dataclass(frozen=True)
class Provenance:
    """Where trajectories come from; recorded in every shard and in the round's manifest."""

    model_hash: str
    """Content hash of the model that generated the trajectories."""
    tokenizer_hash: str
    block_size: int
    seed: int
    round_number: int
    code_version: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, anything JSON can hold."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def to_json(self) -> str:
        """One line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The provenance a JSON object describes; keys a newer version added are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    def require_same_origin(self, other: Provenance, where: str) -> None:
        """Refuse to mix rows of different origin.

        Raises:
            ProvenanceMismatchError: names the fields that differ and both values.
        """
        differences = [
            f"{name}: {getattr(self, name)!r} there, {getattr(other, name)!r} here"
            for name in IDENTITY
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise ProvenanceMismatchError(
                f"{where} holds trajectories of another origin ({'; '.join(differences)}). Use another run or "
                "round, or delete the round's folder if those trajectories are not wanted"
            )
