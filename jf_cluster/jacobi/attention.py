"""Attention over stems and branches: interchangeable exact backends behind transformers' attention interface.

``dense`` is the oracle: one masked SDPA call over everything. ``sdpa`` computes the same without the masked-out work,
a stretch of a stem and the branches that begin in it at a time. ``flex`` is FlexAttention with a block mask; ``flash``
is flash-attn's variable-length kernel, where a branch's queries meet the gathered prefix followed by the branch, causal
with bottom-right alignment, so that no custom kernel is needed.

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

from jf_cluster.jacobi.layout import CachedRows, Forest, spread, take
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


def _folded(query: Tensor, key: Tensor) -> Tensor:
    """Heads that share a key-value head one below the other, so that keys and values need not be repeated."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _pieces(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    """One call a piece of the forest, over slices: nothing is padded, and little is computed that nobody sees."""
    answers: dict[int, Tensor] = {}
    for piece in forest.pieces(query.shape[1] // key.shape[1]):
        q, k, v = take(query, piece.queries), take(key, piece.keys), take(value, piece.keys)
        joined = _attend(_folded(q, k), k, v, piece.bias.to(q.dtype), scaling).view(*q.shape[:3], -1)
        answers.update((span.start, part) for span, part in spread(joined, piece.queries))
    return torch.cat([answers[at] for at in sorted(answers)], dim=2)[0]


class _PiecesOnCpu(torch.autograd.Function):
    """``_pieces`` with the kernel that SDPA takes on a CPU, and gradients added up in place.

    For every slice of the keys autograd would make a tensor of their full length, mostly zeros.

    Measured on CPU, forward and backward of a layer with 860 tokens of one sample: 12.0 ms, where causal calls for
    stems beside masked ones for groups of branches, through autograd, took 14.6; at 14 heads on 2, 43 and 58 ms.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = []
        for piece in forest.pieces(query.shape[1] // key.shape[1]):
            q, k, v = take(query, piece.queries), take(key, piece.keys), take(value, piece.keys)
            answers, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _folded(q, k), k, v, attn_mask=piece.bias.to(q.dtype), scale=scaling
            )
            for span, part in spread(answers.reshape(q.shape), piece.queries):
                out[:, :, span] = part
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.forest, ctx.scaling = forest, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, *sums = ctx.saved_tensors
        of_query = torch.empty_like(query)
        # Sums over many pieces, so in float32 whatever the model computes in.
        of_key, of_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for piece, log_sum in zip(ctx.forest.pieces(query.shape[1] // key.shape[1]), sums, strict=True):
            q, answers, of_answers = (take(x, piece.queries) for x in (query, out, gradient))
            k, v = take(key, piece.keys), take(value, piece.keys)
            q_part, k_part, v_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _folded(of_answers, k), _folded(q, k), k, v, _folded(answers, k), log_sum,
                dropout_p=0.0, is_causal=False, attn_mask=piece.bias.to(q.dtype), scale=ctx.scaling,
            )  # fmt: skip
            for span, part in spread(q_part.reshape(q.shape), piece.queries):
                of_query[:, :, span] = part
            for total, joined in ((of_key, k_part), (of_value, v_part)):
                for span, part in spread(joined, piece.keys):
                    total[:, :, span] += part
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float) -> Tensor:
    if query.device.type != "cpu" or query.shape[3] != value.shape[3]:
        return _pieces(query, key, value, forest, scaling)
    out: Tensor = _PiecesOnCpu.apply(query, key, value, forest, scaling)  # type: ignore[no-untyped-call]
    return out[0]


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
        # The kernels are slow at a single query.
        bias = layout.folded_bias(heads // keys.shape[1])
        out = _attend(_folded(query, keys), keys, values, bias, scaling).view(count, heads, width, depth)
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
