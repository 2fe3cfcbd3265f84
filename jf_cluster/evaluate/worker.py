"""The Ray actor that evaluates: held-out prompts decoded in every mode, in batches and one at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import MODES, Mode
from jf_cluster.jacobi.decoding import Generation, generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import prompt_key
from jf_cluster.models import end_ids, load_model, load_tokenizer, use_cpu


@dataclass(frozen=True)
class Answer:
    """One prompt's response in one mode."""

    prompt_id: str
    text: str
    tokens: tuple[int, ...]
    finished: bool
    forwards: int


class Evaluator:
    """Decodes held-out prompts with model ``round_number``; a worker of jf_cluster.collect.dispatch."""

    def __init__(self, config: Config, round_number: int) -> None:
        use_cpu(config.collect.cpus_per_worker)
        device = "cuda" if config.collect.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"
        self.config = config
        self.tokenizer = load_tokenizer(config)
        self.model = load_model(config, round_number, device)
        self.end_ids = end_ids(self.model, self.tokenizer)

    def ready(self) -> None:
        """Return once the model is loaded."""

    def run(self, prompts: Sequence[Prompt]) -> Report[dict[Mode, list[Answer]]]:
        """Decode a batch in every mode."""
        answers: dict[Mode, list[Answer]] = {
            mode: [
                Answer(
                    prompt.prompt_id,
                    self.tokenizer.decode(made.tokens, skip_special_tokens=True),
                    tuple(int(t) for t in made.tokens),
                    made.finished,
                    made.forwards,
                )
                for prompt, made in zip(prompts, self._generate(prompts, mode), strict=True)
            ]
            for mode in MODES
        }
        return Report(answers, [p.prompt_id for p in prompts])

    def finish(self) -> list[str]:
        """Nothing is held back: results travel with the reports."""
        return []

    def speed(self, prompts: Sequence[Prompt]) -> dict[Mode, float]:
        """Median tokens per second of each mode, one prompt at a time, the modes taking turns on every prompt.

        The first prompt is decoded once before, unmeasured: compilation and first allocations are not speed.
        """
        rates: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        for mode in MODES:
            self._generate(prompts[:1], mode)
        for turn, prompt in enumerate(prompts):
            # Which mode goes first rotates, so that a machine that slows down slows all of them alike.
            for mode in MODES[turn % len(MODES) :] + MODES[: turn % len(MODES)]:
                (made,) = self._generate([prompt], mode)
                if len(made.tokens) > 1 and made.seconds > 0:
                    rates[mode].append((len(made.tokens) - 1) / made.seconds)
        return {mode: statistics.median(found) if found else 0.0 for mode, found in rates.items()}

    def _generate(self, prompts: Sequence[Prompt], mode: Mode) -> list[Generation]:
        settings = self.config.evaluate
        drafting = Drafting(mode, **settings.decoding.model_dump())
        return generate(
            self.model,
            [p.tokens.tolist() for p in prompts],
            max_new_tokens=settings.max_new_tokens,
            end_ids=self.end_ids,
            drafting=drafting,
            keys=[prompt_key(self.config.seed, 0, p.prompt_id) for p in prompts],
        )
