"""Attention over stems and branches: interchangeable exact backends behind transformers' attention interface.

``dense`` is the oracle: one masked SDPA call over everything. ``sdpa`` computes the same without the masked-out work,
stems causally and neighbouring branches together over their stem's prefix and themselves. ``flex`` is FlexAttention
with a block mask; ``flash`` is flash-attn's variable-length kernel, where a branch's queries meet the gathered prefix
followed by the branch, causal with bottom-right alignment, so that no custom kernel is needed.

A model is switched to this attention by ``branch_attention`` and then called with ``layout=`` a ``Forest`` or a
``CachedRows``, ``position_ids`` and no mask.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from jf_cluster.jacobi.layout import CachedRows, Forest
from jf_cluster.jacobi.support import check_forward, check_model
from jf_cluster.jacobi.tails import Tails, attend_tails

Backend = Literal["auto", "dense", "sdpa", "flex", "flash"]
Tensor = torch.Tensor


def choose_backend(device: torch.device) -> Backend:
    """Give the fastest backend that can run here: flash-attn, else FlexAttention on a GPU, else SDPA."""
    if device.type == "cuda":
        return "flash" if importlib.util.find_spec("flash_attn") else "flex"
    return "sdpa"


@dataclass
class _Use:
    """Who runs a model with branch attention at the moment: a stream that is read, others beside it."""

    before: str
    """The model's own attention."""
    now: list[str] = field(default_factory=list)


_uses: WeakKeyDictionary[PreTrainedModel, _Use] = WeakKeyDictionary()
_tried: WeakSet[PreTrainedModel] = WeakSet()
_lock = threading.RLock()


@contextmanager
def branch_attention(model: PreTrainedModel, backend: Backend = "auto") -> Iterator[PreTrainedModel]:
    """Run ``model`` with stem-and-branches attention inside the ``with`` block.

    Blocks may overlap in any way, in several threads too: the model has its own attention back when the last one ends.

    Raises:
        UnsupportedModelError: a model that gives other results in branches than by itself (``support.py``).
    """
    check_model(model)
    wanted = implementation(choose_backend(model.device) if backend == "auto" else backend)
    with _lock:
        use = _uses.get(model) or _Use(model.config._attn_implementation)
        if model not in _tried and not use.now:
            try:
                if check_forward(model, implementation("dense")):
                    _tried.add(model)
            finally:
                model.set_attn_implementation(use.before)
        model.set_attn_implementation(wanted)
        use.now.append(wanted)
        _uses[model] = use
    try:
        yield model
    finally:
        with _lock:
            use.now.remove(wanted)
            model.set_attn_implementation(use.now[-1] if use.now else use.before)
            if not use.now:
                del _uses[model]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool = False
) -> Tensor:
    """SDPA with grouped key-value heads; [B, H, Q, D], [B, G, K, D] twice -> [B, H, Q, D]."""
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    return _attend(query, key, value, forest.dense_mask, scaling)[0]


def _rows(flat: Tensor, index: Tensor) -> Tensor:
    """[heads, T, D] gathered by [rows, width] -> [rows, heads, width, D]."""
    picked = flat.index_select(1, index.reshape(-1))
    return picked.view(flat.shape[0], *index.shape, flat.shape[2]).transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    """One causal call a stem and one call a group of its branches, over slices: nothing is padded or gathered.

    Measured on CPU, forward and backward at 2,400 tokens of 12 samples: 20 ms a layer, where one padded call over
    gathered prefixes took 27 ms and a dense mask over everything 131 ms.
    """
    groups = forest.branch_groups
    sizes = [*forest.stem_lengths, *(g.tokens for g in groups)]
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    stems = len(forest.stem_lengths)
    outs = [
        _attend(q, k, v, None, scaling, causal=True)
        for q, k, v in zip(queries[:stems], keys[:stems], values[:stems], strict=True)
    ]
    for q, k, v, group in zip(queries[stems:], keys[stems:], values[stems:], groups, strict=True):
        prefix = slice(0, group.reach)
        k = torch.cat([keys[group.stem][:, :, prefix], k], dim=2)
        v = torch.cat([values[group.stem][:, :, prefix], v], dim=2)
        # Heads that share a key-value head, one below the other, so that keys and values need not be repeated.
        folded = q.reshape(1, k.shape[1], -1, q.shape[3])
        bias = group.bias.to(q.dtype).repeat(folded.shape[2] // q.shape[2], 1)
        outs.append(_attend(folded, k, v, bias, scaling).view(q.shape))
    return torch.cat(outs, dim=2)[0]


def _flex(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = _compiled_flex() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = compiled(query, key, value, block_mask=forest.block_mask, scale=scaling, enable_gqa=grouped)
    return out[0]


_flex_cache: list[Any] = []


def _compiled_flex() -> Any:
    """FlexAttention compiled once a process: uncompiled it computes the full score matrix."""
    if not _flex_cache:
        from torch.nn.attention.flex_attention import flex_attention

        _flex_cache.append(torch.compile(flex_attention, dynamic=True))
    return _flex_cache[0]


def _flash(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    # By name: transformers would demand flash-attn of whoever loads an exported model that imported it.
    flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    stem_tokens = int(forest.stem_offsets[-1])
    stem = forest.stem_sequences
    outs = [
        flash_attn_varlen_func(
            q[:stem_tokens], k[:stem_tokens], v[:stem_tokens], stem.queries, stem.queries,
            stem.longest_query, stem.longest_query, softmax_scale=scaling, causal=True,
        )
    ]  # fmt: skip
    if forest.branches:
        branch = forest.branch_sequences
        outs.append(
            flash_attn_varlen_func(
                q[stem_tokens:], k.index_select(0, branch.gather), v.index_select(0, branch.gather),
                branch.queries, branch.keys, branch.longest_query, branch.longest_key,
                softmax_scale=scaling, causal=True,
            )
        )  # fmt: skip
    return torch.cat(outs).transpose(0, 1)


def _cached(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: CachedRows, scaling: float) -> Tensor:
    """Write the tokens' keys and values to the cache and attend over it; gives [B, Q, H, D] as the model sees them."""
    layer: Any = module.layer_idx
    keys, values = layout.cache.keys[layer], layout.cache.values[layer]
    if layout.first_slot is not None:
        rows = slice(layout.first_row, layout.first_row + key.shape[0])
        slots = slice(layout.first_slot, layout.first_slot + key.shape[2])
        keys[rows, :, slots], values[rows, :, slots] = key, value
    else:
        # [B, G, Q, D] -> [B * Q, G, D], one row a token.
        keys[layout.write_rows, :, layout.write_slots] = key.transpose(1, 2).flatten(0, 1)
        values[layout.write_rows, :, layout.write_slots] = value.transpose(1, 2).flatten(0, 1)
    if layout.fill is not None:
        query = _rows(query[0], layout.fill)
    count, heads, width, depth = query.shape
    rows = slice(layout.first_row, layout.first_row + count)
    keys, values = keys[rows, :, : layout.reach], values[rows, :, : layout.reach]
    if layout.causal or heads == keys.shape[1] or width > 1:
        out = _attend(query, keys, values, layout.bias, scaling, layout.causal)
    else:
        # Heads that share a key-value head, one below the other: the kernels are slow at a single query.
        folded = query.reshape(count, keys.shape[1], -1, depth)
        bias = layout.folded_bias(heads // keys.shape[1])
        out = _attend(folded, keys, values, bias, scaling).view(count, heads, width, depth)
    out = out.transpose(1, 2)
    if layout.pick is not None:
        out = out.flatten(0, 1).index_select(0, layout.pick)[None]
    return out


def _interface(
    backend: Callable[[Tensor, Tensor, Tensor, Forest, float], Tensor],
) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        layout: Forest | CachedRows | Tails | None = None,
        spare: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if spare:  # So many tokens behind the layout's: they attend to nothing.
            query, key, value = (x[:, :, :-spare] for x in (query, key, value))
            out, _ = attention(module, query, key, value, None, scaling=scaling, layout=layout)
            return pad(out, (0, 0, 0, 0, 0, spare)), None
        if isinstance(layout, CachedRows):
            return _cached(module, query, key, value, layout, scaling), None
        if isinstance(layout, Tails):
            layer: Any = module.layer_idx
            return attend_tails(layer, query, key, value, layout, scaling), None
        if layout is None:
            raise ValueError(
                "a model under branch_attention must be called with layout=; to use it as it is, first exhaust or "
                "close the streams that decode with it"
            )
        # Under autocast rotary embeddings leave queries and keys in float32; kernels take one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return backend(query, key, value, layout, scaling).transpose(0, 1)[None], None

    return attention


def implementation(backend: Backend) -> str:
    """Name under which transformers knows a backend.

    It holds this module's own name, because an exported model carries a copy of the module: each copy recognises only
    its own layouts. It does not hold the word "flash", at which transformers would load kernels of its own.
    """
    return f"branches_{backend}_{__name__.replace('.', '_')}".replace("flash", "varlen")


_BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Forest, float], Tensor]] = {
    "dense": _dense,
    "sdpa": _sdpa,
    "flex": _flex,
    "flash": _flash,
}
for _name, _backend in _BACKENDS.items():
    AttentionInterface.register(implementation(_name), _interface(_backend))
