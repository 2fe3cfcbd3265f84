"""One cell of the ablation: a recipe and a seed, from the same start through its rounds to speed and accuracy.

The whole chain in one process and without a cluster: prompts, responses, trajectories, training, evaluation. What
differs between cells is in ``Recipe``; everything else is the same for all.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from statistics import mean
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.decode import tpf
from bench.tiny_inputs import encode
from jf_cluster.jacobi.attention import Backend, branch_attention
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import PackedBatch, collate, pack
from jf_cluster.jacobi.responses import Response, generate_responses
from jf_cluster.jacobi.samples import Noise, build_sample
from jf_cluster.jacobi.sampling import IntArray, prompt_key
from jf_cluster.jacobi.trajectories import trace
from jf_cluster.tiny.problems import EMBEDDED, Difficulty, Problem, parse_answer, problem
from trajectory_store import Trajectory


@dataclass(frozen=True)
class Recipe:
    """What is ablated; the defaults are the cell all others are compared with."""

    window: int = 1
    schedule: Literal["progressive", "reverse", "random", "constant"] = "progressive"
    t_min: float = 0.25
    ar_weight: float = 20.0
    block_sizes: tuple[int, ...] = (16, 16)
    """Block size of each round; as many rounds as sizes."""
    trajectories: Literal["regenerated", "reused"] = "regenerated"
    """``reused``: the start model's trajectories in every round."""
    responses: Literal["base", "self", "verified"] = "base"

    def __post_init__(self) -> None:
        if min(self.block_sizes) < 1 or self.window < 0 or not 0 <= self.t_min <= 1:
            raise ValueError(f"{self}: block sizes must be at least 1, the window at least 0, t_min in [0, 1]")


@dataclass(frozen=True)
class Effort:
    """How much every cell gets: what makes it minutes on one core."""

    prompts: int = 384
    """Fresh prompts a round."""
    steps: int = 100
    """Optimizer steps a round."""
    step_tokens: int = 2560
    """Tokens of one step, one micro-batch."""
    learning_rate: float = 1e-3
    held_out: int = 240
    max_new_tokens: int = 192
    decoding_block: int = 16

    def __post_init__(self) -> None:
        if min(astuple(self)) <= 0:
            raise ValueError(f"{self}: every one of these must be above 0")


@dataclass(frozen=True)
class Outcome:
    """What a cell shows."""

    tpf: float
    accuracy: float
    consistency: float
    """Mean over the last tenth of the steps, nats a token."""
    tpf_by_round: tuple[float, ...]
    accuracy_by_round: tuple[float, ...]
    cpu_s: float


def run_cell(
    base: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    effort: Effort,
    seed: int,
) -> Outcome:
    """Train a copy of ``start`` by the recipe and measure it; ``base`` writes responses where the recipe says so."""
    begun = time.process_time()
    model = copy.deepcopy(start)
    found, consistency = [], math.nan
    for number, block_size in enumerate(recipe.block_sizes, start=1):
        tracer = start if recipe.trajectories == "reused" else model
        rows = collect(base, model, tracer, tokenizer, number, recipe, effort, seed)
        losses = train(model, rows, block_size, recipe, effort, seed * 100 + number)
        consistency = mean(step.consistency for step in losses[-max(1, effort.steps // 10) :])
        found.append(evaluate(model, tokenizer, effort))
    speeds, accuracies = zip(*found, strict=True)
    return Outcome(speeds[-1], accuracies[-1], consistency, speeds, accuracies, time.process_time() - begun)


def collect(
    base: PreTrainedModel,
    model: PreTrainedModel,
    tracer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    recipe: Recipe,
    effort: Effort,
    seed: int,
    *,
    difficulty: Difficulty = EMBEDDED,
    forward_tokens: int = 2048,
) -> list[Trajectory]:
    """The trajectories of round ``number``, of ``tracer`` towards what ``base`` or ``model`` wrote."""
    chosen = [problem("train", seed, number * 10_000_000 + i, difficulty) for i in range(effort.prompts)]
    keys = [prompt_key(seed, number, str(i)) for i in range(effort.prompts)]
    prompts = [encode(tokenizer, p) for p in chosen]
    responses: list[Response] = []
    for first in range(0, effort.prompts, TOGETHER):
        part = slice(first, first + TOGETHER)
        responses += write_responses(base, model, tokenizer, chosen[part], prompts[part], recipe, effort)
    traces = trace(
        tracer,
        prompts,
        [r.tokens for r in responses],
        block_size=recipe.block_sizes[number - 1],
        keys=keys,
        forward_tokens=forward_tokens,
    )
    return [
        Trajectory(str(i), p.astype(np.int32), r.tokens, r.finished, t.iterations, t.accepted, t.tails)
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]


TOGETHER = 1024
"""Prompts answered in one batch: some gigabytes of keys and values for a model of 100 million parameters."""


def write_responses(
    base: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[IntArray],
    recipe: Recipe,
    effort: Effort,
) -> list[Response]:
    """The round's responses: the base's, the newest model's, or the newest model's where they are right."""
    end = [tokenizer.eos_token_id]
    writer = base if recipe.responses == "base" else model
    responses = generate_responses(writer, prompts, max_new_tokens=effort.max_new_tokens, end_ids=end)
    if recipe.responses == "verified":
        wrong = [
            i
            for i, (p, r) in enumerate(zip(problems, responses, strict=True))
            if parse_answer(tokenizer.decode(r.tokens.tolist(), skip_special_tokens=True)) != p.answer
        ]
        again = generate_responses(base, [prompts[i] for i in wrong], max_new_tokens=effort.max_new_tokens, end_ids=end)
        for i, response in zip(wrong, again, strict=True):
            responses[i] = response
    return responses


@dataclass(frozen=True)
class StepLoss:
    """Means of one step, nats a token."""

    consistency: float
    ar: float


def train(
    model: PreTrainedModel,
    rows: Sequence[Trajectory],
    block_size: int,
    recipe: Recipe,
    effort: Effort,
    seed: int,
    *,
    bf16: bool = False,
    backend: Backend = "auto",
) -> list[StepLoss]:
    """Train in place, with ``bf16`` under autocast; gives every step's losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=effort.learning_rate, weight_decay=0.0)
    noise = Noise(recipe.schedule, recipe.t_min, 1.0, recipe.window)
    warmup = max(1, effort.steps // 10)
    sums, counts = [], []
    model.train()
    with branch_attention(model, backend):
        for step, batch in zip(range(effort.steps), batches(rows, block_size, noise, effort, seed), strict=False):
            part = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, effort.steps - warmup)))
            optimizer.param_groups[0]["lr"] = effort.learning_rate * min(1.0, (step + 1) / warmup) * part
            # Left after every forward: autocast keeps the weights it has cast, and these change with the step.
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                loss = forcing_loss(model, batch.to(model.device))
            loss.total(recipe.ar_weight).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # Read at the end: until then nobody waits for a GPU.
            sums.append((loss.consistency_sum.detach(), loss.ar_sum.detach()))
            counts.append((max(loss.consistency_tokens, 1), max(loss.ar_tokens, 1)))
    model.eval()
    return [StepLoss(c.item() / m, ar.item() / n) for (c, ar), (m, n) in zip(sums, counts, strict=True)]


def batches(
    rows: Sequence[Trajectory], block_size: int, noise: Noise, effort: Effort, seed: int
) -> Iterator[PackedBatch]:
    """Epoch after epoch in a shuffled order, every sample drawn anew."""
    random = np.random.default_rng(seed)
    while True:
        samples = [build_sample(rows[i], block_size, noise, random) for i in random.permutation(len(rows))]
        bins = pack([s.length for s in samples], effort.step_tokens)
        for i in random.permutation(len(bins)):
            yield collate([samples[j] for j in bins[i]])


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, effort: Effort, difficulty: Difficulty = EMBEDDED
) -> tuple[float, float]:
    """``(TPF, accuracy)`` on held-out problems, decoded block after block; TPF over all of them together."""
    chosen = [problem("heldout", 0, i, difficulty) for i in range(effort.held_out)]
    written = generate(
        model,
        [encode(tokenizer, p).tolist() for p in chosen],
        max_new_tokens=effort.max_new_tokens,
        end_ids=[tokenizer.eos_token_id],
        drafting=Drafting("multiblock", effort.decoding_block, blocks=1, pool=0),
    )
    right = sum(
        parse_answer(tokenizer.decode(g.tokens, skip_special_tokens=True)) == p.answer
        for g, p in zip(written, chosen, strict=True)
    )
    return tpf(written), right / len(chosen)
