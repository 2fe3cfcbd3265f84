"""Everything that is particular to DeepSpeed: joining the group, its configuration, its engine around our loss.

Private switches and work-arounds live here and nowhere else. The module is imported in the ranks only.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations import HfDeepSpeedConfig

from jf_cluster.config import Config
from jf_cluster.config import LoraConfig as LoraSettings
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.models import ModelError, load_model, use_cpu
from jf_cluster.train.rendezvous import INIT_METHOD

# Private: its autotuner, which nobody runs here, would import MLflow, more than everything else a rank imports.
sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
import deepspeed  # noqa: E402
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine  # noqa: E402

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]
# Private: it imports its Muon for any optimizer, which is decorated to be compiled, and that imports torch's compiler.
with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
    import deepspeed.runtime.zero.muon.original_muon

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PretrainedConfig, PreTrainedModel

    from jf_cluster.jacobi.packing import PackedBatch


T = TypeVar("T")

WRITTEN_WITHIN_S = 24 * 3600
ADAPTER = "default"
"""What peft calls the one adapter that every layer has under LoRA."""


@dataclass(frozen=True)
class Group:
    """This process's place among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    def from_first(self, value: T | None) -> T:
        """What rank 0 gives; all ranks call this together. Others may read shared storage later, or never."""
        given = [value]
        torch.distributed.broadcast_object_list(given, src=0, device=self.device)
        return cast(T, given[0])

    def on_all(self, *facts: bool) -> list[bool]:
        """Which of some facts hold on every rank; all ranks call this together."""
        holding = torch.tensor(facts, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(holding, op=torch.distributed.ReduceOp.MIN)
        return [bool(fact) for fact in holding.tolist()]


def join_group(config: Config) -> Group:
    """Meet the other ranks where `jf_cluster.train.rendezvous` said, on this rank's device."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = config.train.gpus_per_worker > 0
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        use_cpu(config.train.cpus_per_worker)
        # Private: without this, init_distributed compiles a C++ shared-memory communicator (70 s, needs a compiler).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        init_method=os.environ[INIT_METHOD],
        rank=rank,
        world_size=world_size,
        verbose=False,
    )
    return Group(rank, world_size, device)


def deepspeed_config(config: Config, world_size: int, load_universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; what our configuration does not name keeps DeepSpeed's default."""
    train = config.train
    bf16 = config.model.dtype == "bfloat16"
    on_gpu = train.gpus_per_worker > 0
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": train.zero.persistence_threshold,
        # Communication on a side stream buys nothing without a GPU and costs bookkeeping in every step.
        "overlap_comm": on_gpu,
        "contiguous_gradients": on_gpu,
        # A linear layer written in Python, which keeps no gathered weight alive until its backward; 2% slower here.
        "memory_efficient_linear": on_gpu,
    }
    if train.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if train.zero.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    checkpoint: dict[str, Any] = {"load_universal": load_universal, "tag_validation": "Ignore"}
    if train.checkpoint_async:
        checkpoint["writer"] = {"type": "python", "decoupled": True}  # type "fast" is compiled at run time
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.micro_batches_per_step // world_size,
        "gradient_clipping": train.gradient_clip,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # Offloaded optimizer states are stepped by torch's AdamW: DeepSpeed's CPUAdam is compiled at run time.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "checkpoint": checkpoint,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def rate_factor(step: int, config: Config) -> float:
    """Share of the configured learning rate that optimizer step ``step`` (from 0) is taken with.

    The first step already moves (transformers' schedules start at exactly zero), the last one still does. Written
    here because importing transformers' schedules imports its whole trainer, two seconds of every start.
    """
    train = config.train
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    if train.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if train.schedule == "linear" else 1.0


@dataclass(frozen=True)
class _ModelParts:
    """What the loss needs of a causal model, with the output head as a plain function."""

    base_model: nn.Module
    config: PretrainedConfig
    head: Callable[[Tensor], Tensor]

    def get_output_embeddings(self) -> Callable[[Tensor], Tensor]:
        return self.head


class ForcingModule(nn.Module):
    """A causal model whose forward is the forcing loss, so that DeepSpeed's hooks see one forward per micro-batch.

    The loss applies the output head once per chunk of positions, and the number of chunks differs between ranks. As
    a module, every application could gather the head's weight, a collective that the other ranks may not join: the
    ranks would wait for each other for ever. So the weight is registered as this module's own, gathered once for
    the whole forward and once for the whole backward, and the head is applied as a function.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        super().__init__()
        self.model, self.chunk_tokens = model, chunk_tokens
        for parameter in model.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, batch: PackedBatch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Loss to be minimised and, without gradient, the sums it is made of: float64[3 + RATIO_BUCKETS].

        The sums are of consistency loss, next-token loss and agreements, then of consistency loss by noise ratio.

        Args:
            batch: one micro-batch.
            weights: float64[2], what a token's consistency and next-token loss weigh in the whole step.
        """
        head = self.model.get_output_embeddings()
        parts = _ModelParts(
            self.model.base_model, self.model.config, lambda hidden: linear(hidden, head.weight, head.bias)
        )
        result = forcing_loss(parts, batch, chunk_tokens=self.chunk_tokens)
        sums = torch.stack((result.consistency_sum, result.ar_sum))
        loss = (sums * weights.to(sums.dtype)).sum()
        return loss, torch.cat((sums.detach(), result.agreements.reshape(1), result.bucket_sums)).double()


def leave_group() -> None:
    """Close the connections to the other ranks."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


def build_engine(config: Config, round_number: int, group: Group, load_universal: bool) -> DeepSpeedEngine:
    """The model that round ``round_number`` starts from, sharded over the group, with optimizer and schedule.

    Raises:
        ModelError: it cannot have the adapters that are asked for.
    """
    settings = deepspeed_config(config, group.world_size, load_universal)
    # Alive while from_pretrained runs, it makes transformers build the parameters already sharded.
    sharded_loading = HfDeepSpeedConfig(settings)
    # On the ranks' device already: moved to another one, its parameters would be gathered where nothing computes.
    model = load_model(config, round_number - 1, group.device)
    del sharded_loading
    model.train()
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train = config.train.of_round(round_number)
    if train.lora is not None:
        seed_torch(config.seed, round_number)
        _add_adapters(model, train.lora)
    else:
        _keep_layers_whole(model)
    module = ForcingModule(model, train.loss_chunk_tokens)
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=True,
    )
    schedule = LambdaLR(optimizer, lambda step: rate_factor(step, config))
    if train.checkpoint_async:
        # Private: the writer asks for the node's number, and for ZeRO-3 makes no use of it.
        os.environ |= {"CROSS_SIZE": "1", "CROSS_RANK": "0"}
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    if train.checkpoint_async:
        # Private: what the writer wrote it cannot read again, since torch takes nothing but tensors unless told to.
        writer = engine.checkpoint_engine
        writer.load = TorchCheckpointEngine().load
        # Private: it gives up after five minutes, which not every storage keeps to; a dead writer it sees anyway.
        writer._wait_for_event_with_timeout = partial(writer._wait_for_event_with_timeout, WRITTEN_WITHIN_S)
    return engine


def _keep_layers_whole(model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather and reduce a decoder layer at once, with one pair of hooks instead of a dozen.

    Measured on two CPU ranks with the embedded model and 4,608 tokens, a step takes 0.73 s instead of 0.81, and 0.79
    instead of 0.85 where small ones stay whole (`zero.persistence_threshold`): they are gathered one by one after
    every step. Not for LoRA: where nothing before a layer is trained, such a layer's gradients would be reduced before
    they are computed.
    """
    layers = list(model._no_split_modules or [])  # Private: what transformers keeps on one device
    deepspeed.utils.set_z3_leaf_modules(model, layers, raise_if_not_found=False)


def seed_torch(seed: int, number: int) -> None:
    """Have torch draw the same from here on in every process and after a restart; ``number`` is a step or a round."""
    torch.manual_seed((seed * 1_000_003 + number) % 2**63)


def _add_adapters(model: PreTrainedModel, lora: LoraSettings) -> None:
    """Put LoRA's adapters into ``model`` in place and freeze the rest; every rank draws the same ones."""
    # Slow to import, and few train adapters.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    for name, part in model.named_modules():
        if part in ends and isinstance(part, LoraLayer):  # the loss applies the head's weight by itself
            raise ModelError(
                f"train.lora.target_modules: {name} cannot have adapters: embedding and head stay as they are"
            )
