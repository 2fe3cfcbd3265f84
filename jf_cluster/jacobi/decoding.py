"""The calls people make: ``generate`` for whole responses, ``stream`` for tokens as they are accepted.

AR, Jacobi and multi-block decoding are one loop (``engine.py``) over rows that differ in what they propose
(``drafts.py``). In float32 every mode gives exactly the tokens AR gives, greedy or sampled with the same keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from jf_cluster.jacobi.calibration import AUTO, Auto, choose
from jf_cluster.jacobi.drafts import JACOBI, Drafting, Reason, Row
from jf_cluster.jacobi.engine import decode_rows
from jf_cluster.jacobi.sampling import GREEDY, Sampling
from jf_cluster.jacobi.support import check_model
from jf_cluster.jacobi.text import Decode, TextStream

OnTokens = Callable[[int, list[int]], None]


class PromptError(ValueError):
    """A prompt the model cannot be asked to continue; the message says why."""


@dataclass(frozen=True)
class Generation:
    """One response and what it cost."""

    tokens: list[int]
    """Token ids, the end token or the token that completed a stop string included."""
    reason: Reason
    stop: str | None
    """The stop string that ended it."""
    forwards: int
    """Decode forward passes, the prompt's prefill not counted."""
    forwarded_tokens: int
    """Tokens the model computed on in them: 1 a forward for AR, about the draft's length otherwise."""
    seconds: float
    """Wall clock of the decode steps this response was part of; what the caller did between them is not in it."""
    prefill_seconds: float
    """Wall clock of the prefill this prompt was part of, which writes the first token."""
    accepted_runs: list[int]
    """Tokens each forward added, the prefill's one first."""

    @property
    def finished(self) -> bool:
        """False when the response was cut at ``max_new_tokens``."""
        return self.reason != "length"

    @property
    def tpf(self) -> float:
        """Tokens per forward; the first token, which the prefill writes, is not counted. AR is 1."""
        return (len(self.tokens) - 1) / self.forwards if self.forwards else 1.0

    @property
    def tps(self) -> float:
        """Tokens per second of ``seconds``, prefill and its token not counted; 0 where nothing was measured."""
        return (len(self.tokens) - 1) / self.seconds if self.forwards and self.seconds else 0.0

    @property
    def run_histogram(self) -> dict[int, int]:
        """How many decode forwards added how many tokens, by ascending length."""
        return dict(sorted(Counter(self.accepted_runs[1:]).items()))


def generate(
    model: PreTrainedModel,
    input_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    drafting: Drafting | Auto = JACOBI,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
    on_tokens: OnTokens | None = None,
) -> list[Generation]:
    """Decode a batch of prompts of any lengths.

    Args:
        input_ids: token ids of each prompt.
        end_ids: tokens that end a response; the end token is part of it.
        drafting: how drafts are made; ``"auto"`` takes what a calibration found fastest on this machine, which is
            stored beside the model, and calibrates on some of these prompts where there is none yet.
        keys: a ``prompt_key`` for each prompt (sampling and draft guesses); default the prompt's index.
        stop: strings that end a response; the token that completes one is the last (``text.TextStream`` cuts the text).
        decode: text of token ids, needed for ``stop``.
        on_tokens: called with (prompt index, new tokens) as they are accepted.

    Returns:
        One generation a prompt, in order.

    Raises:
        PromptError: an empty prompt, or prompt and response together longer than the model's context.
        UnsupportedModelError: a model that is not a causal decoder with full attention.
        ValueError: ``max_new_tokens`` below 1, an empty stop string, or stop strings without ``decode``.
    """
    rows = _rows(model, input_ids, max_new_tokens, end_ids, drafting, sampling, keys, stop, decode)
    for index, tokens in decode_rows(model, rows):
        if on_tokens:
            on_tokens(index, tokens)
    return [_generation(row) for row in rows]


def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    drafting: Drafting | Auto = JACOBI,
    sampling: Sampling = GREEDY,
    key: int = 0,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
) -> Iterator[tuple[list[int], Generation]]:
    """Decode one prompt; arguments and errors as in ``generate``, checked before the first token is asked for.

    Yields:
        After every forward pass the tokens it accepted, and the response so far with what it has cost. The model keeps
        its branch attention until the iterator is exhausted or closed.
    """
    rows = _rows(model, [prompt], max_new_tokens, end_ids, drafting, sampling, [key], stop, decode)
    return ((tokens, _generation(rows[0])) for _, tokens in decode_rows(model, rows))


def _rows(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    drafting: Drafting | Auto,
    sampling: Sampling,
    keys: Sequence[int] | None,
    stop: Sequence[str],
    decode: Decode | None,
) -> list[Row]:
    check_model(model)
    for index, prompt in enumerate(prompts):
        check_prompt(model, prompt, max_new_tokens, f"prompt {index}")
    if stop and decode is None:
        raise ValueError("stop strings need decode=, the tokenizer's way from ids to text")
    ends = frozenset(end_ids)
    if drafting == AUTO:
        drafting = choose(model, prompts, ends).drafting
    assert isinstance(drafting, Drafting)
    rows = []
    for prompt, key in zip(prompts, range(len(prompts)) if keys is None else keys, strict=True):
        text = TextStream(decode, stop, prompt) if decode and stop else None
        rows.append(Row(prompt, key, drafting, max_new_tokens, ends, sampling, text))
    return rows


def check_prompt(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, name: str = "the prompt") -> None:
    """Check that ``model`` can continue ``prompt`` by ``max_new_tokens``.

    Raises:
        PromptError: an empty prompt, or prompt and response together longer than the model's context.
        ValueError: ``max_new_tokens`` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    context = getattr(model.config, "max_position_embeddings", None)
    if len(prompt) == 0:
        raise PromptError(f"{name} is empty")
    if context is not None and len(prompt) + max_new_tokens > context:
        raise PromptError(
            f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
            f"model's context of {context}: shorten it or lower max_new_tokens"
        )


def _generation(row: Row) -> Generation:
    return Generation(
        tokens=row.tokens,
        reason=row.reason or "length",
        stop=row.text.stopped if row.text else None,
        forwards=len(row.accepted_runs) - 1,
        forwarded_tokens=row.forwarded_tokens,
        seconds=row.elapsed,
        prefill_seconds=row.prefill_seconds,
        accepted_runs=row.accepted_runs,
    )
