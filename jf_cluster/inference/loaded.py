"""A model ready to answer: weights, tokenizer, end tokens, and the way from messages to token ids and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jf_cluster.config import ConfigError
from jf_cluster.jacobi.calibration import AUTO, Choice, calibrate, describe, store, stored
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import Sampling
from jf_cluster.jacobi.text import Decode
from jf_cluster.models import end_ids, load_checkpoint, tokenizer_of, use_cpu

logger = logging.getLogger(__name__)

CORES = torch.get_num_threads()
"""torch's own choice: the physical cores this process may use, or what OMP_NUM_THREADS says."""
PARAMETERS_PER_THREAD = 10_000_000
"""Threads that share a forward of a few milliseconds save next to nothing on a quiet machine, and on a busy one each
operation waits for the slowest of them: a model of 2.4 million went from 71 tokens/s to 1 with a second thread."""

CALIBRATION_PROMPTS = (
    "What can you help me with?",
    "Explain in a few sentences how a refrigerator works.",
    "Tom has 12 apples and buys 7 more. Then he gives 5 to Ann. How many apples does Tom have now?",
    "Write a Python function that returns the n-th Fibonacci number.",
)
"""What acceptance is measured on where the model's own kind of prompts is not known."""


@dataclass(frozen=True)
class Settings:
    """How the answers are made."""

    drafting: Drafting
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Loaded:
    """A model with what is needed to talk to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and response together; None where the model does not say."""
        context: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return context

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def plain(self, text: str) -> list[int]:
        """Token ids of a text to be continued."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; without a template, its contents line by line.

        Raises:
            jinja2.TemplateError: the template refuses these messages (roles it does not know, their order).
        """
        if not self.has_template:
            return self.plain("\n".join(m["content"] for m in messages) + "\n")
        text: str = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)  # the template writes its own
        return ids

    @property
    def decode(self) -> Decode:
        """Text of token ids, special tokens left out, spaces as they are."""
        return lambda tokens: self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def drafting(self, mode: str, **settings: int | float | None) -> tuple[Drafting, str]:
        """Drafting settings and their explanation; ``auto`` calibrates unless that was done on this machine before.

        ``settings`` (block_size, blocks, spawn_ratio, pool) that are not None override.

        Raises:
            ConfigError: an unknown mode or settings out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        explanation = ""
        try:
            if mode == AUTO:
                choice = stored(self.model)
                if choice is None:
                    logger.info("measuring which decoding is fastest on this machine (once; see calibrate --help)")
                    choice = self.calibrate()
                kept = vars(choice.drafting) | given
                explanation = choice.explanation
                drafting = Drafting(**kept)
            else:
                drafting = Drafting(mode, **given)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return drafting, explanation if explanation and not given else describe(drafting)

    def calibrate(self, prompts: Sequence[Sequence[int]] | None = None) -> Choice:
        """Measure what is fastest here for prompts like these (default: some of many kinds); keep it beside the model.

        Raises:
            ConfigError: none of the prompts fits the model's context.
        """
        ids = prompts or [self.chat([{"role": "user", "content": p}]) for p in CALIBRATION_PROMPTS]
        try:
            choice = calibrate(self.model, ids, frozenset(self.end_ids))
        except ValueError as error:
            raise ConfigError(f"{error}: calibrate with other ones, or choose a --mode") from error
        store(self.model, choice)
        return choice


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load the model ``path`` names, a directory or a hub id, on ``device`` (default: a GPU where there is one).

    On a CPU the process computes with ``threads`` threads from now on (default: the physical cores, or as many as
    OMP_NUM_THREADS says, but no more than the model has work for).

    Raises:
        ModelError: model or tokenizer are missing or cannot be read, or no end token is known.
        ConfigError: an unknown dtype, or a device that is not there.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"unknown dtype {dtype!r}; choose auto, float32, bfloat16 or float16")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "cpu":
        use_cpu(threads or CORES)
    try:
        model = load_checkpoint(
            path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device=torch.device(place),
            trust_remote_code=trust_remote_code,
        )
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise ConfigError(f"device {place!r} cannot be used: {error}") from error
    if place == "cpu" and threads is None:
        torch.set_num_threads(max(1, min(CORES, model.num_parameters() // PARAMETERS_PER_THREAD)))
    tokenizer = tokenizer_of(path, trust_remote_code)
    return Loaded(model, tokenizer, tuple(end_ids(model, tokenizer)))


def table(choice: Choice, machine: str) -> Table:
    """What a calibration measured, the fastest setting first."""
    shown = Table(title=f"decoding on {machine}")
    for column in ("decoding", "tokens/forward", "forward, ms", "tokens in it", "tokens/s (predicted)"):
        shown.add_column(column, justify="left" if column == "decoding" else "right")
    for m in sorted(choice.measured, key=lambda m: -m.tps):
        figures = (f"{m.tpf:.2f}", f"{1000 * m.forward_s:.2f}", f"{m.forward_tokens:.1f}", f"{m.tps:.0f}")
        shown.add_row(describe(m.drafting), *figures, style="bold" if m.drafting == choice.drafting else None)
    return shown
