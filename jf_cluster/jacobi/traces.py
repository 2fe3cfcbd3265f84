"""What both ways of collecting share: the model on flat tokens, and the iterates that become traces.

``trajectories.py`` iterates towards responses that are known, ``one_pass.py`` writes them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from jf_cluster.jacobi.cache import KeyValueCache
from jf_cluster.jacobi.layout import CachedRows
from jf_cluster.jacobi.sampling import IntArray, Sampling
from jf_cluster.jacobi.tails import Tails

Int32Array = NDArray[np.int32]

LOW_PRECISION_STEP = 32
"""Forwards in low precision on a CPU hold a multiple of so many tokens. oneDNN compiles a kernel for every shape, 3 ms
and 0.7 MiB each where it was measured: as many as there are lengths took a third of the time and 2 GiB."""


def token_step(model: PreTrainedModel) -> int:
    """What the tokens of a forward are filled up to a multiple of."""
    return LOW_PRECISION_STEP if model.device.type == "cpu" and model.dtype != torch.float32 else 1


@dataclass(frozen=True)
class Trace:
    """All iterates of one response's blocks, as ``trajectory_store.Trajectory`` stores them.

    ``disagreements`` counts response tokens that are not the model's own choice on the clean prefix: 0 in float32 for a
    response the model wrote itself, rounding in low precision, drift where another model wrote the response. Where
    response and trajectories come from the same forward passes (``respond_and_trace``), the response is what these
    chose, so it is 0 in every precision.
    """

    iterations: Int32Array
    accepted: Int32Array
    tails: Int32Array
    disagreements: int


class Iterates:
    """Iterates as they are found, of any blocks in any order, those of one block by ascending step."""

    def __init__(self) -> None:
        self._row: list[IntArray] = []
        self._column: list[IntArray] = []
        self._accepted: list[IntArray] = []
        self._tails: list[IntArray] = []

    def add(self, row: IntArray, column: IntArray, accepted: IntArray, content: IntArray, length: IntArray) -> None:
        """Keep the next iterate of each of these blocks.

        Args:
            row: number of its response, int64 [N].
            column: number of the block in it, int64 [N].
            accepted: length of the iterate's leading part that equals the fixed point, int64 [N].
            content: the iterate, int64 [N, n].
            length: tokens of the block, int64 [N].
        """
        self._row.append(row)
        self._column.append(column)
        self._accepted.append(accepted)
        self._tails += [c[a:e] for c, a, e in zip(content, accepted, length, strict=True)]

    def traces(self, lengths: Sequence[int], block_size: int, disagreements: IntArray) -> list[Trace]:
        """Give the trace of each response; where it ends before its last block does, the block's iterates are cut.

        A token depends on those before it alone, so cut iterates are those of the shorter block. Ones that differ from
        the fixed point only behind the cut are left out.
        """
        nothing = [np.zeros(0, np.int64)]
        row, column, accepted = (np.concatenate(x or nothing) for x in (self._row, self._column, self._accepted))
        tokens = np.array(lengths, dtype=np.int64)
        end = np.minimum(tokens[row] - column * block_size, block_size)
        kept = np.flatnonzero(accepted < end)
        order = kept[np.lexsort((column[kept], row[kept]))]  # stable: the steps of a block stay in their order
        ends = np.searchsorted(row[order], np.arange(len(tokens) + 1))
        out = []
        for i, first, last in zip(range(len(tokens)), ends[:-1], ends[1:], strict=True):
            mine = order[first:last]
            tails = [self._tails[j][: end[j] - accepted[j]] for j in mine]
            out.append(
                Trace(
                    np.bincount(column[mine], minlength=-(-int(tokens[i]) // block_size)).astype(np.int32),
                    accepted[mine].astype(np.int32),
                    np.concatenate(tails or nothing).astype(np.int32),
                    int(disagreements[i]),
                )
            )
        return out


class FlatModel:
    """A model under ``attention.branch_attention``, called on the tokens of many rows without padding.

    ``keys`` are the prompts' keys; tokens are chosen with the key of the prompt whose number is given.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, keys: Sequence[int]) -> None:
        self.model, self.sampling, self.keys = model, sampling, np.array(keys, dtype=np.int64)
        self.heads_together = model.config.num_attention_heads // model.config.num_key_value_heads
        """Query heads that share a key-value head."""
        self.step = token_step(model)

    def cache(self, rows: int, slots: int) -> KeyValueCache:
        return KeyValueCache(self.model.config, rows, slots, dtype=self.model.dtype, device=self.model.device)

    def forward(
        self, tokens: IntArray, position: IntArray, layout: CachedRows | Tails, keep: IntArray | None
    ) -> torch.Tensor:
        """Forward flat tokens over the cache; logits [kept, V]."""
        spare = -len(tokens) % self.step
        out = self.model(
            input_ids=self._tensor(np.pad(tokens, (0, spare)))[None],
            position_ids=self._tensor(np.pad(position, (0, spare)))[None],
            use_cache=False,
            layout=layout,
            spare=spare,
            logits_to_keep=0 if keep is None else self._tensor(np.pad(keep, (0, -len(keep) % self.step))),
        )
        logits: torch.Tensor = out.logits[0, : len(tokens if keep is None else keep)]
        return logits

    def choose(self, logits: torch.Tensor, prompt: IntArray, place: IntArray) -> IntArray:
        """Give the tokens at response positions ``place`` of the prompts numbered ``prompt``."""
        keys, places = self._tensor(self.keys[prompt]), self._tensor(place)
        chosen: IntArray = self.sampling.choose(logits, keys, places).cpu().numpy()
        return chosen

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)
