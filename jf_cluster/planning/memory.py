"""How much memory and disk a run needs, in bytes, by formula; each part has a name so that it can be shown and checked.

Model states follow DeepSpeed's own ZeRO-3 estimator. Activations and logits are counted from the code; a test holds
the counts against what PyTorch allocates (tests/planning/test_memory.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from jf_cluster.config import Config
from jf_cluster.planning.shapes import ModelShape

GIB = 1 << 30
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}

PROCESS_BYTES = 500 << 20
"""A Ray worker with torch and transformers loaded (measured 450 MB, with deepspeed 540 MB)."""
GPU_RESERVE_BYTES = 2 * GIB
"""Of every GPU: CUDA's context, NCCL's buffers and what the allocator cannot hand out again."""
LOSS_LOGIT_BYTES = 16
"""Of every logit of a chunk of the loss, forward and backward together, in either dtype (measured 14 to 15.4)."""
SAMPLED_LOGIT_BYTES = 40
"""Of every logit where tokens are sampled: the noise is made in 64-bit numbers (measured 36 beside the logit)."""
LIVE_PARAMETERS = 1_000_000_000
"""Most gathered parameters at a time; DeepSpeed's default (stage3_max_live_parameters)."""
BUCKET_PARAMETERS = 500_000_000
"""Gradients reduced together; DeepSpeed's default (reduce_bucket_size)."""
WAVE_TOKENS = 16384
"""Tokens whose keys and values collecting holds at once, at least (jf_cluster.jacobi.trajectories)."""
PROMPT_TOKENS = 512
"""A long prompt, where none has been measured."""
STORE_BYTES = {16: 9.1, 32: 9.7}
"""Of the store for a response token at block size 16, by bits of a token id (docs/store.md)."""
NARROW_VOCABULARY = 65_536
"""Up to so many tokens, ids have 16 bits."""


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """The parts that matter, the largest first."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{shown(size)} {name}" for name, size in ordered if size * 20 > self.total)


def shown(size: float) -> str:
    """Bytes as people read them."""
    if size < GIB:
        return f"{size / (1 << 20):.0f} MiB"
    return f"{size / GIB:,.1f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def element_bytes(config: Config) -> int:
    return ELEMENT_BYTES[config.model.dtype]


def zero3_states(
    shape: ModelShape, ranks_per_node: int, nodes: int, offload: str, element_bytes: int
) -> tuple[int, int]:
    """Bytes of weights, gradients and Adam's states: of host memory a node, of device memory a rank.

    DeepSpeed's estimator reckons with 2-byte weights and 4-byte gradients, master weights and moments; in float32 the
    weights are twice as large.
    """
    # Importing DeepSpeed prints that it has found no accelerator, which is no news to a driver.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    finally:
        logging.disable(disabled)
    host, device, _ = estimate_zero3_model_states_mem_needs(
        shape.parameters,
        shape.largest_layer,
        num_gpus_per_node=ranks_per_node,
        num_nodes=nodes,
        cpu_offload=offload != "none",
        cpu_offload_params=offload == "all",
        zero_init=True,
    )
    wider = (element_bytes - 2) * shape.parameters
    if offload == "all":
        return host + wider // nodes, device
    return host, device + wider // (ranks_per_node * nodes)


def activation_bytes(shape: ModelShape, tokens: int, element_bytes: int, checkpointing: bool) -> int:
    """Tensors kept for the backward pass by the layers and the final norm.

    A norm keeps its input in float32, its normalised input and its output; attention keeps queries, keys, values,
    outputs (of stems and branches apart, and together) and a float32 log-sum a head; the gated unit keeps two
    products, the activation and what enters the last matrix. With checkpointing a layer keeps its input, and one layer
    at a time has all of these.
    """
    e = element_bytes
    norm = (4 + 2 * e) * shape.hidden
    attention = e * (3 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads
    layer = 2 * norm + attention + 4 * e * shape.intermediate
    kept = shape.layers * e * shape.hidden + layer if checkpointing else shape.layers * layer
    return tokens * (kept + norm)


def trained(config: Config, shape: ModelShape) -> ModelShape:
    """The shape with only the parameters that are trained: all, or LoRA's adapters."""
    lora = config.train.lora
    return shape if lora is None else replace(shape, parameters=shape.adapter_parameters(lora.rank))


def longest_sample(config: Config) -> int:
    """Tokens of the longest sample there can be: the prompt, the response, and as many noisy tokens a draw."""
    return PROMPT_TOKENS + (1 + config.noise.draws) * config.collect.max_new_tokens


def longest_micro_batch(config: Config) -> int:
    """Tokens of the largest micro-batch: the budget, or a single sample that is longer than it."""
    return max(config.train.micro_batch_tokens, longest_sample(config))


def training(config: Config, shape: ModelShape, nodes: int) -> tuple[Need, Need]:
    """What a node's host memory and what a rank's device memory hold while training on ``nodes`` nodes."""
    train, e = config.train, element_bytes(config)
    ranks = -(-train.workers // nodes)
    host_states, device_states = zero3_states(trained(config, shape), ranks, nodes, train.zero.offload, e)
    if train.lora is not None:  # the base's weights are sharded too, and have neither gradients nor optimizer states
        if train.zero.offload == "all":
            host_states += e * shape.parameters // nodes
        else:
            device_states += e * shape.parameters // (ranks * nodes)
    chunk = min(train.loss_chunk_tokens, longest_micro_batch(config))
    gathered = min(shape.parameters, LIVE_PARAMETERS) + min(shape.parameters, BUCKET_PARAMETERS)
    device = Need(
        {
            "weights, gradients and optimizer": device_states,
            "gathered weights and gradients": gathered * e,
            "activations": activation_bytes(shape, longest_micro_batch(config), e, train.gradient_checkpointing),
            "logits": LOSS_LOGIT_BYTES * chunk * shape.vocabulary,
        }
    )
    return Need({"offloaded and initial states": host_states, "processes": ranks * PROCESS_BYTES}), device


def _models(config: Config) -> int:
    """Models that a collector holds: the newest, and the base where that one writes responses for it."""
    return 1 if config.collect.responses == "self" or config.rounds == 1 else 2


def collecting(config: Config, shape: ModelShape, prompt_tokens: int = PROMPT_TOKENS) -> Need:
    """What one collector holds on its device: one or two models, the responses' cache, and one wave of trajectories
    towards responses that another model wrote."""
    settings, e = config.collect, element_bytes(config)
    stream = prompt_tokens + settings.max_new_tokens
    wave = max(settings.forward_tokens, WAVE_TOKENS, stream)
    forward = max(settings.forward_tokens, stream)
    logit = SAMPLED_LOGIT_BYTES if settings.temperature > 0 else e
    return Need(
        {
            "weights": _models(config) * shape.parameters * e,
            "cache of responses": settings.batch_prompts * stream * shape.kv_bytes(e),
            "cache of trajectories": 0 if settings.responses == "self" else wave * shape.kv_bytes(e),
            "activations": forward * e * (3 * shape.intermediate + 4 * shape.hidden),
            "logits": forward * shape.vocabulary * logit,
        }
    )


def evaluating(config: Config, shape: ModelShape, prompt_tokens: int = PROMPT_TOKENS) -> Need:
    """What one evaluator holds on its device; in pipelined rounds it is a collector that keeps its models."""
    settings, e = config.evaluate, element_bytes(config)
    stream = prompt_tokens + settings.max_new_tokens
    drafted = settings.decoding.block_size * settings.decoding.blocks
    return Need(
        {
            "weights": (_models(config) if config.overlap == "pipelined" else 1) * shape.parameters * e,
            "cache of responses": settings.batch_prompts * (stream + drafted) * shape.kv_bytes(e),
            "logits": settings.batch_prompts * drafted * shape.vocabulary * e,
        }
    )


def store_bytes_per_token(shape: ModelShape, block_size: int) -> float:
    """Bytes of the store for one response token: measured at block size 16, where the tails grow with the block."""
    return STORE_BYTES[16 if shape.vocabulary <= NARROW_VOCABULARY else 32] * block_size / 16


def checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """A ZeRO-3 checkpoint: weights, and master weights and two moments of what is trained in float32."""
    return element_bytes(config) * shape.parameters + 12 * trained(config, shape).parameters


def disk(config: Config, shape: ModelShape, response_tokens: float | None = None) -> tuple[int, Need]:
    """Bytes of the store, and of what lies under ``runs_dir``; every response as long as it may be where not known."""
    tokens = config.prompts.per_round * (response_tokens or config.collect.max_new_tokens)
    store = sum(
        tokens * store_bytes_per_token(shape, config.collect.block_size_of(r)) for r in range(1, config.collections + 1)
    )
    kept = config.train.keep_checkpoints + 2  # the best, and the one being written
    return int(store), Need(
        {
            "checkpoints": kept * checkpoint_bytes(config, shape),
            "models": config.rounds * shape.parameters * element_bytes(config),
        }
    )
