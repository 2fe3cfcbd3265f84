"""How long a run takes and what it costs, stage by stage: from a calibration, or from the formulas of ``speed.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jf_cluster.config import Config
from jf_cluster.planning import memory, speed
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.shapes import ModelShape
from jf_cluster.planning.speed import ASSUMED, Assumptions

DECODING_MODES = 3
"""An evaluation decodes autoregressively, with Jacobi and with multi-block drafts."""


@dataclass(frozen=True)
class Rates:
    """What a stage costs once, and for each of what it counts; in seconds."""

    collect_once: float
    collect_prompt: float
    """All workers together."""
    train_once: float
    """Start, last checkpoint and export."""
    train_step: float
    evaluate_once: float
    evaluate_prompt: float
    """A held-out prompt, and its share of those decoded for speed."""


@dataclass(frozen=True)
class StageTime:
    """One kind of stage over the whole run."""

    name: str
    count: int
    seconds: float
    """Of one."""

    @property
    def total_s(self) -> float:
        return self.count * self.seconds


def stages(config: Config, rates: Rates) -> list[StageTime]:
    """Time of every stage that ``make train`` goes through.

    Later rounds collect and evaluate faster than the first, because the model has learned to decode in parallel; every
    round is counted like the first.
    """
    return [
        StageTime("collect", config.collections, rates.collect_once + config.prompts.per_round * rates.collect_prompt),
        StageTime("train", config.rounds, rates.train_once + config.train.steps * rates.train_step),
        StageTime("evaluate", config.rounds + 1, rates.evaluate_once + config.evaluate.prompts * rates.evaluate_prompt),
    ]


def together_s(config: Config, every: list[StageTime]) -> float:
    """Time of the whole run; in pipelined rounds the longer of collecting and training hides the other."""
    collect, train, _ = every
    hidden = train.count * min(collect.seconds, train.seconds) if config.overlap == "pipelined" else 0.0
    return sum(stage.total_s for stage in every) - hidden


def computed_rates(
    config: Config, shape: ModelShape, machines: Machines, assumed: Assumptions = ASSUMED, gpus_per_collector: int = 1
) -> Rates:
    """Rates by formula, for GPUs whose figures are known."""
    trained = speed.training(config, shape, machines, assumed)
    made = speed.collecting(config, shape, machines, 1, assumed, gpus_per_collector)
    collectors = config.collect.workers / gpus_per_collector
    evaluate = config.evaluate
    rows = min(evaluate.batch_prompts, math.ceil(evaluate.prompts / collectors))
    batch_s = speed.decoding_forward_s(config, shape, machines, rows, assumed, gpus_per_collector)
    alone_s = speed.decoding_forward_s(config, shape, machines, 1, assumed, gpus_per_collector)
    longest = min(assumed.longest_response * assumed.response_tokens, evaluate.max_new_tokens)
    batches = math.ceil(evaluate.prompts / (rows * collectors))
    answering = batches * longest * batch_s
    timing = evaluate.speed_prompts * assumed.response_tokens * alone_s
    checkpoints = math.ceil(config.train.steps / config.train.checkpoint_every_steps)
    load_s = loading_s(config, shape, machines, assumed)
    return Rates(
        collect_once=load_s,
        collect_prompt=assumed.response_tokens / (collectors * made.tokens_per_s),
        train_once=load_s
        + checkpoints * memory.checkpoint_bytes(config, shape) / assumed.shared_storage_bytes_per_s
        + shape.parameters * memory.element_bytes(config) / assumed.one_writer_bytes_per_s,
        train_step=trained.step_s,
        evaluate_once=2 * load_s,
        evaluate_prompt=DECODING_MODES * (answering + timing) / evaluate.prompts,
    )


def computed_passes(config: Config, assumed: Assumptions = ASSUMED) -> float:
    """Times that a round's steps go over the samples collected for it, at the lengths that are assumed.

    A sample is a prompt, its response, and for each draw as many noisy tokens as the mean noise ratio leaves of it.
    """
    train, noise = config.train, config.noise
    response = min(assumed.response_tokens, config.collect.max_new_tokens)
    sample = assumed.prompt_tokens + response * (1 + noise.draws * (noise.t_min + noise.t_max) / 2)
    trained = train.steps * train.micro_batches_per_step * train.micro_batch_tokens * assumed.packing
    return trained / (config.prompts.per_round * sample)


def loading_s(config: Config, shape: ModelShape, machines: Machines, assumed: Assumptions = ASSUMED) -> float:
    """Seconds until every node has read the model once from storage that all share."""
    return machines.nodes * shape.parameters * memory.element_bytes(config) / assumed.shared_storage_bytes_per_s


def gpus_held(config: Config) -> int:
    """GPUs that a run keeps from the first stage to the last."""
    return math.ceil(config.needs("gpus_per_worker"))


def span(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.1f} days"
