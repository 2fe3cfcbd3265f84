"""CUDA graphs of a decode step: recorded once for each shape, then replayed without any launch from Python.

A step is a function of one packed integer tensor; everything else it touches (weights, key-value cache) stays where it
is. So a graph has one input buffer, filled from one on the host, and output buffers: replaying it allocates nothing,
and all that is read back is what the model chose. Where there is no CUDA the same function runs on the same static
shapes without being recorded, which is how the tests reach it.

Not run so far: recording and replaying on a GPU, because none was at hand. The shapes, the masks and the padding are
tested against the oracle on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Result = tuple[torch.Tensor, torch.Tensor]
"""Logits and their argmax."""
Step = Callable[[torch.Tensor, int], Result]
"""(packed integers, key slots) -> result; must only do device work and must give the same when repeated."""

WARM_UPS = 3
"""Runs before recording: libraries choose kernels and allocate workspaces in their first calls."""


@dataclass(frozen=True)
class _Recorded:
    packed: torch.Tensor
    result: Result | None
    graph: torch.cuda.CUDAGraph | None


class Graphs:
    """Steps by shape and reach."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._recorded: dict[tuple[torch.Size, int], _Recorded] = {}
        self._host: dict[tuple[int, ...], torch.Tensor] = {}

    @property
    def count(self) -> int:
        """Shapes met so far."""
        return len(self._recorded)

    def host(self, *shape: int) -> torch.Tensor:
        """The buffer to write a step's packed integers into, int64 ``shape``; what the last step left is in it."""
        if shape not in self._host:
            self._host[shape] = torch.zeros(shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return self._host[shape]

    def run(self, packed: torch.Tensor, reach: int) -> Result:
        """Give the step's result for ``packed`` (on the host); the next run of the same shape overwrites it.

        The host's buffer may be written again once something of the result has been read.
        """
        key = (packed.shape, reach)
        if key not in self._recorded:
            self._recorded[key] = self._record(packed, reach)
        recorded = self._recorded[key]
        recorded.packed.copy_(packed, non_blocking=True)
        if recorded.graph is None or recorded.result is None:
            return self._step(recorded.packed, reach)
        recorded.graph.replay()
        return recorded.result

    def _record(self, packed: torch.Tensor, reach: int) -> _Recorded:
        buffer = packed.to(self._device, copy=True)
        if self._device.type != "cuda":
            return _Recorded(buffer, None, None)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(buffer, reach)  # writes the cache's slots of this very step, the same each time
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._step(buffer, reach)
        return _Recorded(buffer, result, graph)
