"""How fast each stage is on GPUs whose data sheet is known: formulas that can be checked by hand.

A stage takes as long as the slowest of what it does: arithmetic, memory, network. Nothing here was run on a GPU;
what is assumed stands in :class:`Assumptions` and is printed with every figure. On a machine that is there, a
calibration (``calibration.py``) replaces all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from jf_cluster.config import Config
from jf_cluster.planning.machines import Gpu, Machines
from jf_cluster.planning.memory import element_bytes, trained
from jf_cluster.planning.shapes import ModelShape


@dataclass(frozen=True)
class Assumptions:
    """What is not in the configuration, the model or a data sheet."""

    prompt_tokens: float = 200.0
    response_tokens: float = 600.0
    longest_response: float = 2.0
    """Longest response of a batch against the mean: a batch runs until its last row ends."""
    noisy_tokens: float = 6.7
    """Tokens forwarded for a response token's trajectories at block size 16: measured on an untrained model
    (docs/paper.md), where they are most; grows with the block size."""
    packing: float = 0.97
    """Share of a micro-batch's budget that holds tokens (measured on the embedded run: 0.98)."""
    training_mfu: float = 0.40
    """Share of peak arithmetic reached by forward and backward passes."""
    forward_mfu: float = 0.40
    """The same by forward passes of tens of thousands of tokens: prompts and trajectories."""
    memory_share: float = 0.60
    """Share of peak memory bandwidth reached while decoding."""
    shared_model: float = 0.80
    """Share of its speed that a GPU keeps when several hold one model together."""
    launch_s: float = 0.35e-3
    """A layer's kernel launches in a decoding forward without CUDA graphs: the least a layer takes."""
    network_share: float = 0.80
    """Share of peak bandwidth that collectives reach."""
    hop_s: float = 4e-6
    """Latency of each rank in a ring."""
    shared_storage_bytes_per_s: float = 10e9
    """All nodes together: loading models and writing checkpoints."""
    one_writer_bytes_per_s: float = 2e9
    """One process: the export, which rank 0 writes."""
    host_memory_bytes_per_s: float = 200e9
    """A node's host memory, which offloaded optimizer steps go through."""


ASSUMED = Assumptions()


@dataclass(frozen=True)
class TrainingSpeed:
    """One optimizer step."""

    compute_s: float
    """Arithmetic of one micro-batch."""
    network_s: float
    """Collectives of one micro-batch, which run beside the arithmetic."""
    optimizer_s: float
    """The update itself where it happens in host memory."""
    step_s: float
    tokens_per_s: float
    """All ranks together."""
    hidden_tokens: float
    """Tokens of a micro-batch from which on arithmetic takes longer than the network."""


@dataclass(frozen=True)
class CollectingSpeed:
    """Response tokens per second of one collector."""

    decoding: float
    tracing: float
    one_pass: bool
    """Whether the model that iterates writes the responses too, in the same forwards."""

    @property
    def tokens_per_s(self) -> float:
        """Another model writes the responses first, and then their trajectories are iterated."""
        return self.tracing if self.one_pass else 1 / (1 / self.decoding + 1 / self.tracing)


def collective_bytes_per_s(machines: Machines, ranks: int, assumed: Assumptions = ASSUMED) -> float:
    """Bandwidth of a ring: NVLink within a node; between nodes all of a node's adapters carry one ring together."""
    gpu = _gpu(machines)
    if ranks <= machines.gpus_per_node:
        return gpu.link_bytes_per_s * assumed.network_share
    return min(gpu.link_bytes_per_s, machines.gpus_per_node * gpu.network_bytes_per_s) * assumed.network_share


def training(config: Config, shape: ModelShape, machines: Machines, assumed: Assumptions = ASSUMED) -> TrainingSpeed:
    """Time of an optimizer step: ``ranks`` micro-batches at a time, network beside arithmetic, then the update."""
    train, gpu, e = config.train, _gpu(machines), element_bytes(config)
    tokens = train.micro_batch_tokens * assumed.packing
    # Forward, backward to the inputs and to the weights, and forward once more; frozen weights have no gradient.
    passes = 3 + train.gradient_checkpointing - (train.lora is not None)
    keys = (assumed.prompt_tokens + assumed.response_tokens) / 2
    token_s = passes * shape.forward_flops(keys) / (gpu.flops * assumed.training_mfu)
    # ZeRO-3 gathers the weights for the forward and for the backward pass and scatters the gradients.
    moved = 3 * shape.parameters * e * (train.workers - 1) / train.workers
    latency = 3 * shape.layers * (train.workers - 1) * assumed.hop_s
    network_s = moved / collective_bytes_per_s(machines, train.workers, assumed) + latency
    optimizer_s = 0.0
    if train.zero.offload != "none":
        # Adam reads weights, gradient and two moments and writes three of them, 4 bytes each.
        optimizer_s = 28 * trained(config, shape).parameters / machines.nodes / assumed.host_memory_bytes_per_s
    rounds = train.micro_batches_per_step // train.workers
    step_s = rounds * max(tokens * token_s, network_s) + optimizer_s
    return TrainingSpeed(
        tokens * token_s,
        network_s,
        optimizer_s,
        step_s,
        train.micro_batches_per_step * tokens / step_s,
        network_s / token_s,
    )


def collecting(
    config: Config,
    shape: ModelShape,
    machines: Machines,
    round_number: int = 1,
    assumed: Assumptions = ASSUMED,
    gpus_per_collector: int = 1,
) -> CollectingSpeed:
    """Speed of one collector, whose matrices are spread over ``gpus_per_collector`` GPUs."""
    gpu, n = _gpu(machines), config.collect.block_size_of(round_number)
    forward_s = decoding_forward_s(config, shape, machines, config.collect.batch_prompts, assumed, gpus_per_collector)
    longest = min(assumed.longest_response * assumed.response_tokens, config.collect.max_new_tokens)
    decoding = config.collect.batch_prompts * assumed.response_tokens / (longest * forward_s)
    forwarded = 1 + assumed.prompt_tokens / assumed.response_tokens + assumed.noisy_tokens * n / 16
    flops = forwarded * shape.forward_flops(assumed.prompt_tokens + assumed.response_tokens / 2)
    share = _speed_up(gpus_per_collector, assumed)
    own = config.collect.responses != "base" or (round_number == 1 and config.collect.generator == "builtin")
    return CollectingSpeed(decoding, share * gpu.flops * assumed.forward_mfu / flops, own)


def decoding_forward_s(
    config: Config,
    shape: ModelShape,
    machines: Machines,
    rows: int,
    assumed: Assumptions = ASSUMED,
    gpus_per_collector: int = 1,
) -> float:
    """Seconds of a forward pass of one token for each of ``rows`` rows: memory, arithmetic or kernel launches."""
    gpu, e = _gpu(machines), element_bytes(config)
    keys = assumed.prompt_tokens + assumed.response_tokens / 2
    read = shape.multiplied * e + rows * keys * shape.kv_bytes(e)
    memory_s = read / (gpu.memory_bytes_per_s * assumed.memory_share)
    compute_s = rows * shape.forward_flops(keys) / (gpu.flops * assumed.forward_mfu)
    return max(max(memory_s, compute_s) / _speed_up(gpus_per_collector, assumed), shape.layers * assumed.launch_s)


def _speed_up(gpus: int, assumed: Assumptions) -> float:
    return gpus * assumed.shared_model if gpus > 1 else 1.0


def _gpu(machines: Machines) -> Gpu:
    assert machines.gpu is not None, "times are only computed for GPUs whose figures are known"
    return machines.gpu
