"""Decoding one response with every forward pass written down: what was drafted, accepted, recycled; for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from jf_cluster.jacobi.drafts import Drafting, Row
from jf_cluster.jacobi.engine import decode_rows


@dataclass(frozen=True)
class Forward:
    """One decode forward pass; positions count from the response's first token."""

    at: int
    """Position of the first drafted token: so many were written before."""
    drafted: int
    """Tokens of the draft."""
    active: int
    """Of these, how many belong to the real-active block; those behind hang off unverified text."""
    accepted: int
    """Tokens this forward added, the model's own one behind the confirmed ones included."""
    recycled: bool
    """Whether the confirmed ones came from an n-gram of the pool rather than from the draft."""


@dataclass(frozen=True)
class Watched:
    """A response, how it was drafted, and its forwards after the prefill, which wrote the first token."""

    drafting: Drafting
    tokens: tuple[int, ...]
    forwards: tuple[Forward, ...]


@dataclass(eq=False)
class _WatchedRow(Row):
    forwards: list[Forward] = field(default_factory=list)

    def advance(self, written: Sequence[int], candidates_written: Sequence[Sequence[int]]) -> tuple[int, int | None]:
        at, drafted = len(self.tokens), len(self.draft)
        active = min(drafted, self._blocks[0]) if self._blocks else drafted
        run, source = super().advance(written, candidates_written)
        self.forwards.append(Forward(at, drafted, active, len(self.tokens) - at, source is not None))
        return run, source


def watch(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    drafting: Drafting,
    key: int = 0,
) -> Watched:
    """Decode one prompt greedily, as ``decoding.generate`` does with the same ``key``."""
    row = _WatchedRow(prompt, key, drafting, max_new_tokens, frozenset(end_ids))
    for _ in decode_rows(model, [row]):
        pass
    return Watched(drafting, tuple(row.tokens), tuple(row.forwards))
