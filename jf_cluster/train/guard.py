"""Steps that would spoil the weights: noticing them, and the record of the data that is left out because of them.

A spoilt step ends the ranks. Their driver starts them again from the last whole checkpoint, and the plan leaves the
recorded rows out from the recorded step on, so that the weights become those of a run that never had them.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

NORMS = 50
"""Steps whose gradient norms say what is usual."""
FEW_NORMS = 10
"""With fewer no norm is unusual: the first steps of a training differ most."""


@dataclass(frozen=True)
class Skip:
    """Rows of the round that training leaves out, and why."""

    identity: str
    """Of the training they belong to; another one, on other data, does not know them."""
    step: int
    """From this step (from 0) on they are left out; before it they did no harm."""
    reason: str
    rows: tuple[int, ...]
    prompt_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))  # JSON has lists only
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))


def read_skips(path: Path, identity: str) -> list[Skip]:
    """What the training called ``identity`` leaves out so far."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    skips = [Skip(**json.loads(line)) for line in whole.splitlines()]
    return [skip for skip in skips if skip.identity == identity]


def record_skip(path: Path, skip: Skip) -> None:
    """Add a line to the record, on disk when this returns."""
    with path.open("a+b") as stream:
        stream.seek(0)
        whole, newline, _ = stream.read().rpartition(b"\n")
        stream.truncate(len(whole + newline))  # without a line that a kill has cut
        stream.write(json.dumps(asdict(skip)).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


class Guard:
    """Judges the steps of a training in order.

    Args:
        norm_factor: a gradient norm has exploded when it is more than this many times the median of the last ones.
        norms: of the steps done before, so that a resumed training judges like an uninterrupted one.
    """

    def __init__(self, norm_factor: float, norms: Iterable[float] = ()) -> None:
        self._factor, self._norms = norm_factor, deque(norms, maxlen=NORMS)

    def trouble(self, loss: float, gradient_norm: float) -> str | None:
        """Say why the step must not count, or None and remember its norm."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss}, gradient norm {gradient_norm}"
        usual = median(self._norms) if len(self._norms) >= FEW_NORMS else math.inf
        if gradient_norm > self._factor * usual:
            return f"gradient norm {gradient_norm:.4g}, usually {usual:.4g}"
        self._norms.append(gradient_norm)
        return None
