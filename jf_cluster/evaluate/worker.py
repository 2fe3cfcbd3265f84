"""The job of evaluating: prompts decoded in every mode, in batches and one at a time, and graded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import MODES, Mode
from jf_cluster.evaluate.graders import grade
from jf_cluster.evaluate.tasks import grader_of
from jf_cluster.jacobi.decoding import Generation, generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import prompt_key
from jf_cluster.jacobi.text import decode_behind
from jf_cluster.jacobi.trajectories import trace
from jf_cluster.models import end_ids, load_tokenizer


@dataclass(frozen=True)
class Answer:
    """One prompt's response in one mode."""

    prompt_id: str
    text: str
    tokens: tuple[int, ...]
    finished: bool
    runs: tuple[int, ...]
    """Tokens that each decode forward added."""
    right: bool | None = None
    """None without a grader."""


@dataclass(frozen=True)
class Answered:
    """A batch's answers by mode, and how its AR responses' blocks were iterated (``evaluate.multiblock_prompts``)."""

    answers: dict[Mode, list[Answer]]
    blocks: int
    iterations: int


@dataclass(frozen=True)
class Speeds:
    """Median tokens per second, one prompt at a time, prefill not counted."""

    modes: dict[Mode, float]
    transformers: float


class Evaluator:
    """Decodes prompts with model ``round_number``; a job of jf_cluster.collect.crew.

    Args:
        multiblock: ids of the prompts that are decoded in mode multiblock too and iterated block by block.
    """

    def __init__(self, config: Config, round_number: int, multiblock: Collection[str], models: WorkerModels) -> None:
        self.config, self.multiblock = config, multiblock
        self.tokenizer = load_tokenizer(config)
        self.model = models.of_round(round_number)
        self.end_ids = end_ids(self.model, self.tokenizer)

    def run(self, prompts: Sequence[Prompt]) -> Report[Answered]:
        """Decode a batch in every mode and grade it."""
        some = [p for p in prompts if p.prompt_id in self.multiblock]
        asked: dict[Mode, Sequence[Prompt]] = {"ar": prompts, "jacobi": prompts, "multiblock": some}
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        answers: dict[Mode, list[Answer]] = {
            mode: [
                Answer(
                    prompt.prompt_id,
                    decode_behind(decode, prompt.tokens.tolist(), made.tokens),
                    tuple(int(t) for t in made.tokens),
                    made.finished,
                    tuple(made.accepted_runs[1:]),
                )
                for prompt, made in zip(asked[mode], self._generate(asked[mode], mode), strict=True)
            ]
            for mode in MODES
        }
        if (grader := grader_of(self.config)) != "none":
            # All modes at once: in float32 they say the same, which is then judged once.
            pairs = [(a.text, p.answer) for mode in MODES for a, p in zip(answers[mode], asked[mode], strict=True)]
            threads = max(1, int(self.config.collect.cpus_per_worker))
            verdicts = iter(grade(grader, pairs, self.config.sandbox, threads))
            answers = {mode: [replace(a, right=next(verdicts)) for a in answers[mode]] for mode in MODES}
        traces = trace(
            self.model,
            [p.tokens for p in some],
            [np.array(a.tokens, dtype=np.int32) for a in answers["ar"] if a.prompt_id in self.multiblock],
            block_size=self.config.evaluate.decoding.block_size,
            keys=self._keys(some),
            forward_tokens=self.config.collect.forward_tokens,
        )
        answered = Answered(
            answers,
            blocks=sum(len(t.iterations) for t in traces),
            iterations=sum(int(t.iterations.sum()) for t in traces),
        )
        return Report(answered, [p.prompt_id for p in prompts])

    def finish(self) -> list[str]:
        """Nothing is held back: results travel with the reports."""
        return []

    def speed(self, prompts: Sequence[Prompt]) -> Speeds:
        """Measure every mode and transformers' own ``generate``, all taking turns on every prompt.

        The first prompt is decoded once before, unmeasured: compilation and first allocations are not speed.
        """
        sides: tuple[Mode | None, ...] = (*MODES, None)  # None: transformers
        rates: dict[Mode | None, list[float]] = {side: [] for side in sides}
        for side in sides:
            self._rate(prompts[0], side)
        for turn, prompt in enumerate(prompts):
            # Which side goes first rotates, so that a machine that slows down slows all of them alike.
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                if rate := self._rate(prompt, side):
                    rates[side].append(rate)
        medians = {side: statistics.median(found) if found else 0.0 for side, found in rates.items()}
        return Speeds({mode: medians[mode] for mode in MODES}, medians[None])

    def _rate(self, prompt: Prompt, mode: Mode | None) -> float:
        """Tokens per second after the first token; 0 where there are none."""
        return self._transformers_rate(prompt) if mode is None else self._generate([prompt], mode)[0].tps

    def _transformers_rate(self, prompt: Prompt) -> float:
        ids = torch.tensor(prompt.tokens[None].tolist(), device=self.model.device)
        begun: list[float] = []

        def first_token(*_: object) -> bool:
            # The prefill is not counted on any side: the clock starts when the first new token is known.
            if not begun:
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)  # transformers asks before the prefill is done
                begun.append(time.perf_counter())
            return False

        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.config.evaluate.max_new_tokens,
            do_sample=False,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
            repetition_penalty=1.0,  # some models' own settings have one
            stopping_criteria=[first_token],
        )
        written = out.shape[1] - ids.shape[1]  # on a GPU, knowing the shape is knowing that it is done
        return (written - 1) / (time.perf_counter() - begun[0])

    def _generate(self, prompts: Sequence[Prompt], mode: Mode) -> list[Generation]:
        settings = self.config.evaluate
        drafting = Drafting(mode, **settings.decoding.model_dump())
        return generate(
            self.model,
            [p.tokens.tolist() for p in prompts],
            max_new_tokens=settings.max_new_tokens,
            end_ids=self.end_ids,
            drafting=drafting,
            keys=self._keys(prompts),
        )

    def _keys(self, prompts: Sequence[Prompt]) -> list[int]:
        return [prompt_key(self.config.seed, 0, p.prompt_id) for p in prompts]
