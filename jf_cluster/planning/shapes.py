"""A model's dimensions from its config.json alone: no weights are read and no tensor is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jf_cluster.config import Config
from jf_cluster.messages import first_line
from jf_cluster.models import ModelError, is_hub_id

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on."""

    parameters: int
    largest_layer: int
    """Most parameters that one module holds itself, as DeepSpeed's estimator counts."""
    multiplied: int
    """Parameters that take part in a token's matrix products: all but an untied input embedding."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context_tokens: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of LoRA's adapters at every matrix of the layers."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    def kv_bytes(self, element_bytes: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width * element_bytes

    def forward_flops(self, keys: float) -> float:
        """Floating-point operations of one token's forward pass that attends to ``keys`` tokens."""
        return 2 * self.multiplied + 4 * self.layers * self.query_width * keys


def shape_of(settings: PretrainedConfig, trust_remote_code: bool = False) -> ModelShape:
    """Dimensions of the model that a transformers configuration describes.

    Raises:
        UnsupportedModelError: a model that Jacobi decoding cannot use.
        ModelError: not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from jf_cluster.jacobi.support import check_model

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{settings.model_type} is not a causal language model: {error}") from error
    check_model(model)
    text = settings.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return ModelShape(
        parameters=parameters,
        largest_layer=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        multiplied=parameters if tied else parameters - embedding.numel(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        context_tokens=int(getattr(text, "max_position_embeddings", 0) or 1 << 30),
    )


def read_shape(config: Config) -> ModelShape:
    """Dimensions of a run's base model; of a hub id only its config.json is fetched.

    Raises:
        ModelError: there is none, or it is not a causal language model.
        UnsupportedModelError: a model that Jacobi decoding cannot use.
    """
    from transformers import AutoConfig

    base, trust = config.model.base, config.model.trust_remote_code
    if not Path(base).is_dir() and not is_hub_id(base):
        raise ModelError(f"model.path: no model at {base}: the directory does not exist")
    try:
        settings = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(f"model.path: {config.model.path} has no config.json that can be read ({reason})") from error
    return shape_of(settings, trust)
