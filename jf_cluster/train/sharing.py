"""What every rank has to know and no rank has to work out alone: each does its part, and they put the parts together.

The planning of a step needs the lengths of all its samples. Their number grows with the ranks, so what a rank does of
it must not. The ranks plan in a thread beside the one that trains, hence over a process group of their own: there all
come to the same work in the same order, and nothing they exchange can be taken for something of the training.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from trajectory_store import StoreError

Work = Callable[[slice], NDArray[np.int64]]
"""Gives a number for each of the places that a slice takes."""


def alone(count: int, work: Work) -> NDArray[np.int64]:
    """All of it by the one who asks, int64 [count]."""
    return work(slice(0, count))


class Sharing:
    """The ranks' group for such work; made and used by all of them together, and by one thread of each."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._group = dist.new_group(backend="gloo")

    def __call__(self, count: int, work: Work) -> NDArray[np.int64]:
        """What ``work`` gives for all places, int64 [count], of which this rank asks it for its part.

        Every rank takes part exactly once, also one whose work fails, so nobody waits for somebody who has given up.

        Raises:
            Exception: what ``work`` raised on any rank, on all of them.
        """
        together = torch.zeros(count + 1, dtype=torch.int64)
        error: Exception | None = None
        try:
            part = slice(self._rank, count, self._world_size)
            together[part] = torch.from_numpy(work(part))
        except Exception as raised:  # noqa: BLE001  the others get it too
            error, together[count] = raised, 1
        dist.all_reduce(together, group=self._group)
        if together[count]:
            raise self._first(error)
        return together[:count].numpy()

    def _first(self, error: Exception | None) -> Exception:
        """The error of this rank, or else of the first that has one: whoever is asked names the cause."""
        # What a class of somebody else needs to be made again is not known; these take their message.
        known = error is None or isinstance(error, StoreError | OSError)
        errors: list[Exception | None] = [None] * self._world_size
        dist.all_gather_object(
            errors, error if known else RuntimeError(f"{type(error).__name__}: {error}"), group=self._group
        )
        return error or next(e for e in errors if e is not None)
