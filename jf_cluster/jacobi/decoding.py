"""The decode loop: AR, Jacobi and multi-block decoding of a batch over one preallocated key-value cache.

Every mode is the same loop. A row forwards its last accepted token, its draft and its recycled candidates; the
candidates are branches off the same cache, not copies of it. What a row proposes and accepts is in ``drafts.py``. In
float32 every mode gives exactly the tokens AR gives, greedy or sampled with the same keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.cache import KeyValueCache
from jf_cluster.jacobi.drafts import JACOBI, Drafting, Row
from jf_cluster.jacobi.layout import CachedRows, visible
from jf_cluster.jacobi.sampling import GREEDY, Sampling

OnTokens = Callable[[int, list[int]], None]


class PromptError(ValueError):
    """A prompt the model cannot be asked to continue; the message says why."""


@dataclass(frozen=True)
class Generation:
    """One response and what it cost."""

    tokens: list[int]
    finished: bool
    """False when the response was cut at ``max_new_tokens``."""
    forwards: int
    """Decode forward passes, the prompt's prefill not counted."""
    seconds: float
    """Wall clock from the end of the batch's prefill to this response's last token."""
    accepted_runs: list[int]
    """Tokens each forward added, the prefill's one first."""

    @property
    def tpf(self) -> float:
        """Tokens per forward; the first token, which the prefill writes, is not counted. AR is 1."""
        return (len(self.tokens) - 1) / self.forwards if self.forwards else 1.0


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    input_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    drafting: Drafting = JACOBI,
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> list[Generation]:
    """Decode a batch of prompts of any lengths.

    Args:
        input_ids: token ids of each prompt.
        end_ids: tokens that end a response; the end token is part of it.
        keys: a ``prompt_key`` for each prompt (sampling and draft guesses); default the prompt's index.
        on_tokens: called with (prompt index, new tokens) as they are accepted.

    Returns:
        One generation a prompt, in order.

    Raises:
        PromptError: an empty prompt, or prompt and response together longer than the model's context.
        UnsupportedModelError: a model that is not a causal decoder with full attention.
    """
    _check(model, input_ids, max_new_tokens)
    keys = range(len(input_ids)) if keys is None else keys
    rows = [
        Row(prompt, key, drafting, max_new_tokens, frozenset(end_ids))
        for prompt, key in zip(input_ids, keys, strict=True)
    ]
    if not rows:
        return []
    with branch_attention(model):
        return _Batch(model, rows, drafting, sampling, on_tokens).run()


def _check(model: PreTrainedModel, input_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    context = getattr(model.config, "max_position_embeddings", None)
    for index, prompt in enumerate(input_ids):
        if len(prompt) == 0:
            raise PromptError(f"prompt {index} is empty")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise PromptError(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"model's context of {context}: shorten it or lower max_new_tokens"
            )


class _Batch:
    """Rows still being decoded: active row i lies in cache row i, ``order[i]`` is the prompt it belongs to."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Row],
        drafting: Drafting,
        sampling: Sampling,
        on_tokens: OnTokens | None,
    ) -> None:
        self.model, self.rows, self.sampling, self.on_tokens = model, rows, sampling, on_tokens
        longest = max(len(r.prompt) for r in rows)
        slots = longest + max(r.max_new_tokens for r in rows) + drafting.longest
        self.cache = KeyValueCache(model.config, len(rows), slots, dtype=model.dtype, device=model.device)
        self.order = list(range(len(rows)))
        self.results: dict[int, Generation] = {}

    def run(self) -> list[Generation]:
        firsts = self._prefill()
        self.begun = time.perf_counter()
        for row, first in zip(self.rows, firsts, strict=True):
            row.begin(first)
        if self.on_tokens:
            for index, row in enumerate(self.rows):
                self.on_tokens(index, row.tokens)
        self._retire()
        while self.order:
            self._step()
            self._retire()
        return [self.results[i] for i in range(len(self.rows))]

    def _prefill(self) -> list[int]:
        lengths = np.array([len(r.prompt) for r in self.rows])
        width, count = int(lengths.max()), len(self.rows)
        tokens = np.zeros((count, width), dtype=np.int64)
        for row, r in enumerate(self.rows):
            tokens[row, : lengths[row]] = r.prompt
        slots = np.broadcast_to(np.arange(width), (count, width))
        layout = CachedRows(
            self.cache, self._tensor(np.repeat(np.arange(count), width)), self._tensor(slots.ravel()),
            mask=None, reach=width, causal=True,
        )  # fmt: skip
        base = self.model.base_model(
            input_ids=self._tensor(tokens), position_ids=self._tensor(slots), use_cache=False, layout=layout
        )
        last = base.last_hidden_state[torch.arange(count), self._tensor(lengths - 1)]
        head: torch.nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return self._choose(head(last), [r.key for r in self.rows], np.zeros(count, int))

    def _step(self) -> None:
        """One forward pass of all active rows."""
        active = [self.rows[i] for i in self.order]
        count = len(active)
        # Slots: a row's stem, the last accepted token, the draft, then the candidates one after the other.
        last = np.array([len(r.prompt) + len(r.tokens) - 1 for r in active])
        sizes = [1 + len(r.draft) + sum(map(len, r.candidates)) for r in active]
        width = max(sizes)
        tokens = np.zeros((count, width), dtype=np.int64)
        offset = np.broadcast_to(np.arange(width), (count, width))
        # Rank of a token in the response is its position less the prompt's length less one for the token it chooses.
        depth, own_begin, stem_extra = (
            offset.copy(),
            np.zeros((count, width), np.int64),
            np.zeros((count, width), np.int64),
        )
        for i, r in enumerate(active):
            tokens[i, : sizes[i]] = [r.tokens[-1], *r.draft, *(t for c in r.candidates for t in c)]
            at = 1 + len(r.draft)
            for c in r.candidates:
                span = slice(at, at + len(c))
                depth[i, span] = 1 + np.arange(len(c))
                own_begin[i, span], stem_extra[i, span] = at, 1
                at += len(c)
        slots = last[:, None] + offset
        reach = int(last.max()) + width
        mask = None
        if width > 1 or count > 1:
            end = last[:, None] + stem_extra
            stem_end, own, own_end = (self._tensor(a)[:, :, None] for a in (end, last[:, None] + own_begin, slots))
            keys = torch.arange(reach, device=self.model.device)
            mask = visible(torch.zeros_like(stem_end), stem_end, own, own_end, keys)[:, None]
        layout = CachedRows(
            self.cache,
            self._tensor(np.repeat(np.arange(count), width)),
            self._tensor(slots.ravel()),
            mask=mask,
            reach=reach,
        )
        logits = self.model(
            input_ids=self._tensor(tokens),
            position_ids=self._tensor(last[:, None] + depth),
            use_cache=False,
            layout=layout,
        ).logits
        places = np.array([len(r.tokens) for r in active])[:, None] + depth
        chosen = self._choose(logits.flatten(0, 1), np.repeat([r.key for r in active], width).tolist(), places.ravel())
        for i, r in enumerate(active):
            self._accept(i, r, chosen[i * width : i * width + sizes[i]], int(last[i]))

    def _accept(self, i: int, row: Row, chosen: list[int], last: int) -> None:
        at, after = 1 + len(row.draft), []
        starts = []
        for c in row.candidates:
            starts.append(at)
            after.append(chosen[at : at + len(c)])
            at += len(c)
        before = len(row.tokens)
        run, source = row.advance(chosen[: 1 + len(row.draft)], after)
        if source is not None:
            first = last + starts[source]
            self.cache.copy_slots(i, slice(first, first + run), slice(last + 1, last + 1 + run))
        if self.on_tokens:
            self.on_tokens(self.order[i], row.tokens[before:])

    def _retire(self) -> None:
        """Take finished rows out; the last active row moves into the freed place, so active rows stay first."""
        for i in reversed(range(len(self.order))):
            row = self.rows[self.order[i]]
            if not row.done:
                continue
            self.results[self.order[i]] = Generation(
                row.tokens,
                row.finished,
                len(row.accepted_runs) - 1,
                time.perf_counter() - self.begun,
                row.accepted_runs,
            )
            moved = self.order.pop()
            if i < len(self.order):
                self.order[i] = moved
                self.cache.copy_row(len(self.order), i)

    def _choose(self, logits: torch.Tensor, keys: Sequence[int], places: np.ndarray) -> list[int]:
        keys_tensor = torch.tensor(keys, device=logits.device)
        chosen: list[int] = self.sampling.choose(logits, keys_tensor, self._tensor(places)).tolist()
        return chosen

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.model.device)
