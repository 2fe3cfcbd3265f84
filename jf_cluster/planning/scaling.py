"""The tables of docs/scaling.md: a 7B and a 70B model on 8, 64 and 512 H100s, by the formulas that ``plan`` uses.

``python -m jf_cluster plan --scaling`` prints them; a test holds the page and this module together. Nothing in them
was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jf_cluster.config import (
    CollectConfig,
    Config,
    DecodingConfig,
    EvaluateConfig,
    ModelConfig,
    PromptsConfig,
    TrainConfig,
    ZeroConfig,
)
from jf_cluster.planning import memory, speed
from jf_cluster.planning.estimate import Rates, computed_rates, loading_s, span, stages
from jf_cluster.planning.fitting import changed
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.memory import GPU_RESERVE_BYTES, shown
from jf_cluster.planning.shapes import ModelShape, shape_of
from jf_cluster.planning.speed import ASSUMED, CollectingSpeed, TrainingSpeed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GPUS = (8, 64, 512)
STEP_TOKENS = 8 * 32_768
"""Of one optimizer step in configs/qwen2.5-coder-7b.yaml."""
ROUND_TOKENS = 10_000 * STEP_TOKENS
"""Trained on in a round, whatever the number of GPUs."""
COLLECTOR_GPUS = {"7B": 1, "70B": 4}
"""GPUs of one collector. More than one is not built: today a collector holds a whole model on one GPU."""


def model_7b() -> PretrainedConfig:
    """Dimensions of Qwen2.5-Coder-7B."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False,
    )  # fmt: skip


def model_70b() -> PretrainedConfig:
    """Dimensions of Llama-3.3-70B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
    )  # fmt: skip


MODELS: dict[str, Callable[[], PretrainedConfig]] = {"7B": model_7b, "70B": model_70b}


@dataclass(frozen=True)
class Plan:
    """One model on a number of H100s."""

    model: str
    shape: ModelShape
    gpus: int

    @cached_property
    def machines(self) -> Machines:
        return Machines.thought_of(f"{self.gpus}xH100")

    @cached_property
    def config(self) -> Config:
        """The paper's settings (configs/qwen2.5-coder-7b.yaml), one micro-batch a rank, the least offload that fits."""
        for offload in ("none", "optimizer", "all"):
            config = self._config(offload)
            if memory.training(config, self.shape, self.machines.nodes)[1].total <= self.usable:
                break
        return config

    def _config(self, offload: Any) -> Config:
        micro_batch_tokens = 32_768
        return Config(
            rounds=2,
            model=ModelConfig(dtype="bfloat16"),
            prompts=PromptsConfig(per_round=450_000),
            collect=CollectConfig(
                workers=self.gpus, gpus_per_worker=1, batch_prompts=128, max_new_tokens=2048, responses="self",
                block_size=(16, 32), forward_tokens=65_536,
            ),
            evaluate=EvaluateConfig(
                prompts=400, batch_prompts=32, max_new_tokens=2048, decoding=DecodingConfig(block_size=64)
            ),
            train=TrainConfig(
                workers=self.gpus, gpus_per_worker=1, steps=ROUND_TOKENS // (self.gpus * micro_batch_tokens),
                micro_batch_tokens=micro_batch_tokens, micro_batches_per_step=self.gpus, gradient_checkpointing=True,
                checkpoint_every_steps=500, zero=ZeroConfig(offload=offload),
            ),
        )  # fmt: skip

    @property
    def usable(self) -> int:
        return self.machines.gpu_bytes - GPU_RESERVE_BYTES

    @cached_property
    def training(self) -> TrainingSpeed:
        return speed.training(self.config, self.shape, self.machines)

    @cached_property
    def collecting(self) -> CollectingSpeed:
        return speed.collecting(self.config, self.shape, self.machines, 1, ASSUMED, self.collector_gpus)

    @property
    def collector_gpus(self) -> int:
        return COLLECTOR_GPUS[self.model]

    @property
    def collectors(self) -> int:
        return self.gpus // self.collector_gpus

    @cached_property
    def rates(self) -> Rates:
        return computed_rates(self.config, self.shape, self.machines, ASSUMED, self.collector_gpus)


def plans() -> list[Plan]:
    """Every model on every number of GPUs."""
    shapes = {name: shape_of(make()) for name, make in MODELS.items()}
    return [Plan(name, shape, gpus) for name, shape in shapes.items() for gpus in GPUS]


def tables() -> dict[str, str]:
    """The page's tables in Markdown, by name."""
    every = plans()
    return {
        "assumptions": _assumptions(),
        "memory": _memory(every),
        "speed": _speed(every),
        "round": _round(every),
        "traffic": _traffic(every),
        "batch": _batch(every),
        "storage": _storage(every),
    }


def _assumptions() -> str:
    return _markdown(["assumed", "value"], [[f"`{f.name}`", f"{getattr(ASSUMED, f.name):g}"] for f in fields(ASSUMED)])


def _memory(every: list[Plan]) -> str:
    rows = []
    for p in every:
        host, rank = memory.training(p.config, p.shape, p.machines.nodes)
        collector = memory.collecting(p.config, p.shape)
        offload = p.config.train.zero.offload
        rows.append(
            [
                *(p.model, str(p.gpus), offload, *(shown(rank.parts[part]) for part in rank.parts), shown(rank.total)),
                "fits" if rank.total <= p.usable else "does not fit",
                shown(host.total) if offload != "none" else "-",
                shown(collector.total),
                "fits" if collector.total <= p.usable else "does not fit",
            ]
        )
    parts = memory.training(every[0].config, every[0].shape, 1)[1].parts
    names = ["model", "GPUs", "offload", *parts, "a rank", f"in {shown(every[0].usable)}", "a node's host memory"]
    return _markdown([*names, "a collector", "on one GPU"], rows)


def _speed(every: list[Plan]) -> str:
    return _markdown(
        [
            *("model", "GPUs", "GPUs a collector", "writing responses, tokens/s a collector"),
            *("trajectories, tokens/s a collector", "collecting, response tokens/s", "training, tokens/s"),
            "training, tokens/s a GPU",
        ],
        [
            [
                *(p.model, str(p.gpus), str(p.collector_gpus)),
                *(f"{p.collecting.decoding:,.0f}", f"{p.collecting.tracing:,.0f}"),
                f"{p.collectors * p.collecting.tokens_per_s:,.0f}",
                *(f"{p.training.tokens_per_s:,.0f}", f"{p.training.tokens_per_s / p.gpus:,.0f}"),
            ]
            for p in every
        ],
    )


def _round(every: list[Plan]) -> str:
    rows = []
    for p in every:
        collect, train, evaluate = stages(p.config, p.rates)
        together = collect.seconds + train.seconds + evaluate.seconds
        rows.append(
            [
                *(p.model, str(p.gpus), span(collect.seconds), span(train.seconds), span(evaluate.seconds)),
                *(span(together), f"{together / 3600 * p.gpus:,.0f}"),
            ]
        )
    return _markdown(["model", "GPUs", "collect", "train", "evaluate", "a round", "GPU hours"], rows)


def _traffic(every: list[Plan]) -> str:
    return _markdown(
        [
            *("model", "GPUs", "tokens a step", "steps", "arithmetic of a micro-batch", "network of a micro-batch"),
            *("update in host memory", "slowest", "network hidden from … tokens"),
        ],
        [
            [
                *(p.model, str(p.gpus), f"{p.gpus * p.config.train.micro_batch_tokens:,}"),
                *(f"{p.config.train.steps:,}", f"{p.training.compute_s:.2f} s", f"{p.training.network_s:.2f} s"),
                f"{p.training.optimizer_s:.2f} s",
                _slowest(p.training),
                f"{p.training.hidden_tokens:,.0f}",
            ]
            for p in every
        ],
    )


def _batch(every: list[Plan]) -> str:
    """What happens when a step keeps its tokens, whatever the number of ranks."""
    rows = []
    for p in every:
        tokens = STEP_TOKENS // p.gpus
        found = speed.training(changed(p.config, {"train.micro_batch_tokens": tokens}), p.shape, p.machines)
        rows.append(
            [
                *(p.model, str(p.gpus), f"{tokens:,}", f"{found.compute_s:.2f} s", f"{found.network_s:.2f} s"),
                *(
                    _slowest(found),
                    f"{found.tokens_per_s:,.0f}",
                    f"{100 * found.tokens_per_s / p.training.tokens_per_s:.0f}%",
                ),
            ]
        )
    return _markdown(
        ["model", "GPUs", "tokens a rank", "arithmetic", "network", "slowest", "tokens/s", "of the table above"], rows
    )


def _slowest(found: TrainingSpeed) -> str:
    times = {"arithmetic": found.compute_s, "network": found.network_s, "host memory": found.optimizer_s}
    return max(times, key=lambda name: times[name])


def _storage(every: list[Plan]) -> str:
    rows = []
    for p in every:
        tokens = p.config.prompts.per_round * ASSUMED.response_tokens
        written = p.collectors * p.collecting.tokens_per_s * memory.store_bytes_per_token(p.shape, 16)
        checkpoint = memory.checkpoint_bytes(p.config, p.shape)
        load_s = loading_s(p.config, p.shape, p.machines)
        collect, train, _ = stages(p.config, p.rates)
        rows.append(
            [
                *(p.model, str(p.gpus)),
                *(shown(tokens * memory.store_bytes_per_token(p.shape, n)) for n in (16, 32)),
                f"{written / 1e6:,.2f} MB/s",
                shown(checkpoint),
                span(checkpoint / ASSUMED.shared_storage_bytes_per_s),
                span(p.shape.parameters * 2 / ASSUMED.one_writer_bytes_per_s),
                span(load_s),
                f"{100 * load_s / collect.seconds:.0f}%",
                f"{100 * (1 - p.config.train.steps * p.rates.train_step / train.seconds):.0f}%",
            ]
        )
    return _markdown(
        [
            *("model", "GPUs", "store of a round, n = 16", "n = 32", "written while collecting", "checkpoint"),
            *("writing it", "export", "loading the model", "of collecting", "not stepping, of training"),
        ],
        rows,
    )


def _markdown(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
