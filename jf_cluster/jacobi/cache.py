"""A preallocated key-value cache whose rows are written in place and never copied while decoding."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig


def aligned(keys: int) -> int:
    """So many keys or more, as many as a vector register holds: what is left of a register is computed one by one.

    Attention over 150 keys takes a fifth to a third longer on a CPU than over 160 of which the mask hides 10.
    """
    return -(-keys // 16) * 16


class KeyValueCache:
    """Keys and values of every layer, ``[rows, G, slots, D]`` each; slot i of a row holds the token at position i.

    It has at least the slots asked for, an aligned number of them.
    """

    def __init__(
        self, config: PretrainedConfig, rows: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads: int = config.num_key_value_heads
        width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, heads, aligned(slots), width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def part(self, rows: slice) -> KeyValueCache:
        """These rows as a cache that shares its memory with this one."""
        part = object.__new__(KeyValueCache)
        part.keys, part.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        return part

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (int64 [kept]), in this order."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite a row with another."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def copy_slots(self, row: int, source: slice, target: slice) -> None:
        """Copy a few slots of one row to other slots of it (an accepted branch into its place on the stem).

        In place, unless the slots overlap, as they may behind a draft shorter than the branch: at a response's end.
        """
        apart = source.start >= target.stop or target.start >= source.stop
        for tensor in (*self.keys, *self.values):
            taken = tensor[row, :, source]
            tensor[row, :, target] = taken if apart else taken.clone()
