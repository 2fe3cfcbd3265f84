"""Which models can be decoded and trained in branches, and the output head as a model itself applies it.

What a configuration tells is checked before any work. The rest is tried: a few tokens go once through the model as it
is and once as branches, and a model for which the two differ is refused instead of decoded wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.cache import KeyValueCache
from jf_cluster.jacobi.layout import Branch, CachedRows, Forest

Tensor = torch.Tensor

TRIED_TOKENS, TRIED_BRANCH = 8, 3
"""Length of the stem that a model is tried on, and where its branch starts."""


class UnsupportedModelError(ValueError):
    """The model cannot be run with stem-and-branches attention; the message says why."""


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless ``model`` is a decoder with full causal attention in every layer."""
    config = model.config
    kind, context = config.model_type, getattr(config, "max_position_embeddings", None) or float("inf")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; Jacobi decoding needs a causal decoder")
    layers = getattr(config, "layer_types", None)
    others = sorted(set(layers or []) - {"full_attention"})
    if others:
        raise UnsupportedModelError(
            f"{kind} has layers of kind {', '.join(others)}; Jacobi decoding needs full attention over a key-value "
            "cache in every layer"
        )
    window = getattr(config, "sliding_window", None)
    if not layers and window is not None and window < context:
        raise UnsupportedModelError(
            f"{kind} attends to the last {window} tokens of its context of {context}; Jacobi decoding needs full "
            f"attention in every layer: where {window} tokens are enough, set max_position_embeddings to {window} in "
            "its config.json"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{kind} caches compressed keys and values (MLA), which is not supported")
    rotary = getattr(config, "rope_parameters", None) or {}
    original = rotary.get("original_max_position_embeddings") or context
    if rotary.get("rope_type") == "longrope" and original < context:
        raise UnsupportedModelError(
            f"{kind} turns its positions by other angles once a sequence is longer than {original} tokens (longrope), "
            f"so that a token depends on what comes after it: set max_position_embeddings to {original} in its "
            "config.json"
        )
    caps = ("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap")
    if capped := [name for name in caps if getattr(config, name, None)]:
        raise UnsupportedModelError(f"{kind} bounds its scores or logits ({capped[0]}), which is not supported")
    if getattr(config, "num_key_value_heads", None) is None or not getattr(model, "_supports_attention_backend", True):
        raise UnsupportedModelError(f"{kind} does not use transformers' attention interface over a key-value cache")


@torch.no_grad()
def check_forward(model: PreTrainedModel, dense: str) -> bool:
    """Raise UnsupportedModelError unless a stem with a branch gives the logits that ``model`` gives as it is.

    Args:
        dense: name of the attention with a dense mask, under which the model is left.

    Returns:
        Whether it was tried: not while training, nor without weights here (on the meta device, sharded over ranks).
    """
    weight = model.get_input_embeddings().weight
    if model.training or weight.is_meta or hasattr(weight, "ds_id"):
        return False
    tokens = torch.arange(TRIED_TOKENS, device=model.device) % weight.shape[0]
    own = model(input_ids=tokens[None], use_cache=False).logits[0]
    headed = output_head(model)(model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
    model.set_attn_implementation(dense)
    try:
        flat, cached = _as_branches(model, tokens), _over_a_cache(model, tokens)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be run in branches, a forward of {TRIED_TOKENS} tokens fails: {error}"
        ) from error
    if _differ(flat, torch.cat([own, own[TRIED_BRANCH:]])) or _differ(cached, own) or _differ(headed, own, 0.01):
        raise UnsupportedModelError(
            f"{model.config.model_type} computes other logits in branches than by itself: its attention or its output "
            "head does something that Jacobi decoding does not know"
        )
    return True


def _differ(ours: Tensor, theirs: Tensor, low_precision: float = 0.2) -> bool:
    """Whether logits [N, V] differ by far more than rounding does (in low precision it may turn a router's choice)."""
    a, b = (x.float() - x.float().mean(-1, keepdim=True) for x in (ours, theirs))
    return not bool((a - b).norm() <= (1e-3 if theirs.dtype == torch.float32 else low_precision) * b.norm())


def _as_branches(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of a stem and a branch that goes on as it does."""
    forest = Forest((TRIED_TOKENS,), (Branch(0, TRIED_BRANCH, TRIED_TOKENS - TRIED_BRANCH),), tokens.device)
    out = model.base_model(
        input_ids=torch.cat([tokens, tokens[TRIED_BRANCH:]])[None],
        position_ids=forest.position_ids,
        use_cache=False,
        layout=forest,
    )
    return output_head(model)(out.last_hidden_state[0])


def _over_a_cache(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of a stem in two parts, the second over the first one's keys and values in a cache."""
    cache = KeyValueCache(model.config, 1, TRIED_TOKENS, dtype=model.dtype, device=model.device)
    numbers = torch.arange(TRIED_TOKENS, device=model.device)
    parts = []
    for begin, end in ((0, TRIED_BRANCH), (TRIED_BRANCH, TRIED_TOKENS)):
        seen = numbers[None, :end] <= numbers[begin:end, None]
        layout = CachedRows(cache, None, None, mask=seen[None, None], reach=end, first_slot=begin)
        positions = numbers[None, begin:end]
        out = model(input_ids=tokens[None, begin:end], position_ids=positions, use_cache=False, layout=layout)
        parts.append(out.logits[0])
    return torch.cat(parts)


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """From last hidden states [..., width] to logits [..., V], as the model's own forward goes.

    Args:
        model: what has ``get_output_embeddings`` and ``config`` as a causal model does.
    """
    head: Callable[[Tensor], Tensor] = model.get_output_embeddings()
    divisor = getattr(model.config, "logits_scaling", None)  # Granite
    factor = getattr(model.config, "logit_scale", None)  # Cohere
    if divisor is not None:
        return lambda hidden: head(hidden) / divisor
    return head if factor is None else lambda hidden: head(hidden) * factor
