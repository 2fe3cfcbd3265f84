"""Responses and their trajectories in one pass, where the model that iterates is the one that writes.

All rows decode block after block in the same forwards, each at its own place: a row whose block is done begins its next
one, a row that ends makes room for a waiting prompt. A forward holds for each row its last known token, which has no
keys and values in the cache yet, and the tail behind it. What is known stays in the cache at its own slots, and the
next forward overwrites the rest, so nothing is copied or put back. A token of a response is forwarded as often as its
iterates ask for and once more, and writing the responses costs nothing beside.

A response's end is not known before it is reached: blocks iterate in full, and their iterates are cut there afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import Backend, branch_attention
from jf_cluster.jacobi.decoding import check_prompt
from jf_cluster.jacobi.layout import CachedRows
from jf_cluster.jacobi.responses import Response
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling, initial_guess
from jf_cluster.jacobi.tails import lay_out_rows
from jf_cluster.jacobi.traces import FlatModel, Iterates, Trace

JOINING_ROWS = 8
"""Rows that join together: a forward of one or two prompts alone would cost its overhead."""


@torch.inference_mode()
def respond_and_trace(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    *,
    block_size: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    keys: Sequence[int],
    forward_tokens: int = 2048,
    sampling: Sampling = GREEDY,
    backend: Backend = "auto",
) -> list[tuple[Response, Trace]]:
    """Write one response a prompt and iterate its blocks on the way.

    In float32 the responses are ``generate_responses``'s and the traces are ``trace``'s of them, token for token.

    Args:
        prompts: token ids, int [P] each.
        block_size: n; the last block of a response holds what is left.
        keys: a ``prompt_key`` for each prompt.
        forward_tokens: most tokens in one forward pass (a longer prompt, or a larger block, still goes in one).

    Returns:
        A response and its trace for each prompt, in order. The response is what these forwards chose, so no token of it
        disagrees with them in any precision.

    Raises:
        PromptError: an empty prompt, or one that leaves no room for ``max_new_tokens``.
    """
    for index, prompt in enumerate(prompts):
        check_prompt(model, prompt.tolist(), max_new_tokens, f"prompt {index}")
    with branch_attention(model, backend):
        rows = _Rows(FlatModel(model, sampling, keys), prompts, block_size, max_new_tokens, end_ids, forward_tokens)
        return rows.run()


class _Rows:
    """The rows that decode together: their cache and their state; active ones come first in both.

    A row's current block is ``content``, ``length`` tokens from response position ``start`` on, of which the first
    ``known`` are the fixed point's.
    """

    def __init__(
        self,
        model: FlatModel,
        prompts: Sequence[IntArray],
        block_size: int,
        max_new_tokens: int,
        end_ids: Sequence[int],
        forward_tokens: int,
    ) -> None:
        self.model, self.n, self.most, self.forward_tokens = model, block_size, max_new_tokens, forward_tokens
        self.prompts = [np.asarray(p, dtype=np.int64) for p in prompts]
        self.end_ids = np.array(sorted(end_ids), dtype=np.int64)
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        slots = max((len(p) for p in prompts), default=0) + max_new_tokens
        self.rows = min(max(1, forward_tokens // block_size), len(prompts))
        self.active = 0
        self.cache = model.cache(self.rows, slots)
        self.member, self.prompt, self.start, self.length, self.known = np.zeros((5, self.rows), dtype=np.int64)
        self.content = np.zeros((self.rows, block_size), dtype=np.int64)
        self.text = np.zeros((self.rows, slots), dtype=np.int64)
        """The prompt and the response's blocks before the current one."""
        self.iterates = Iterates()
        self.responses: dict[int, Response] = {}

    def run(self) -> list[tuple[Response, Trace]]:
        while self.waiting or self.active:
            while self.waiting and self.rows - self.active >= min(JOINING_ROWS, len(self.waiting), self.rows):
                self._join()
            if self.active:
                self._iterate()
        responses = [self.responses[i] for i in range(len(self.prompts))]
        traces = self.iterates.traces([len(r.tokens) for r in responses], self.n, np.zeros(len(responses), np.int64))
        return list(zip(responses, traces, strict=True))

    def _join(self) -> None:
        """Prefill waiting prompts, whose rows begin their first blocks."""
        lengths = np.cumsum([len(self.prompts[i]) for i in self.waiting[: self.rows - self.active]])
        count = max(1, int((lengths <= self.forward_tokens).sum()))
        members, self.waiting = self.waiting[:count], self.waiting[count:]
        rows = np.arange(self.active, self.active + count)
        self.active += count
        lengths = np.array([len(self.prompts[i]) for i in members])
        layout, _, slot = CachedRows.of_stems(self.cache.part(slice(int(rows[0]), self.active)), lengths)
        tokens = np.concatenate([self.prompts[i] for i in members])
        logits = self.model.forward(tokens, slot, layout, np.cumsum(lengths) - 1)
        for row, member in zip(rows, members, strict=True):
            self.text[row, : len(self.prompts[member])] = self.prompts[member]
        self.member[rows], self.prompt[rows], self.start[rows], self.length[rows] = members, lengths, 0, 0
        self._begin(rows, self.model.choose(logits, self.member[rows], self.start[rows]))
        self._leave(rows, np.zeros(count, dtype=np.int64))

    def _begin(self, rows: IntArray, first: IntArray) -> None:
        """Put the next block behind the current one, which is done; the prefix has chosen its first token."""
        for row, token in zip(rows.tolist(), first, strict=True):
            end = self.prompt[row] + self.start[row]
            self.text[row, end : end + self.length[row]] = self.content[row, : self.length[row]]
            self.start[row] += self.length[row]
            context = self.text[row, : self.prompt[row] + self.start[row]]
            key, column = int(self.model.keys[self.member[row]]), int(self.start[row]) // self.n
            self.content[row] = initial_guess(key, column, context, self.n)
            self.content[row, 0] = token
        self.length[rows] = np.minimum(self.n, self.most - self.start[rows])
        self.known[rows] = 1

    def _iterate(self) -> None:
        """One forward of all rows: an iteration of each one's block, or of a done block the next one's first token."""
        rows = np.arange(self.active)
        known, start, length, content = (x[: self.active] for x in (self.known, self.start, self.length, self.content))
        done = known == length
        # The block's last token chooses nothing within it: it is forwarded when the block is done.
        begin, end = known - 1, np.where(done, length, length - 1)
        row = np.repeat(rows, end - begin)
        place = np.concatenate([np.arange(*span) for span in zip(begin, end, strict=True)])
        slot = (self.prompt[: self.active] + start)[row] + place
        layout = lay_out_rows(self.cache, row, slot, self.model.heads_together)
        logits = self.model.forward(content[row, place], slot, layout, None)
        chosen = self.model.choose(logits, self.member[row], start[row] + place + 1)
        after = content.copy()
        within = ~done[row]
        after[row[within], place[within] + 1] = chosen[within]
        differs = after != content
        accepted = np.where(differs.any(1), differs.argmax(1), length)
        going = np.flatnonzero(accepted < length)
        self.iterates.add(
            self.member[going], start[going] // self.n, accepted[going], content[going], length[going]
        )  # copies all of them: the state's own arrays change below
        self.content[: self.active] = after
        before = np.where(done, 0, known)
        self.known[: self.active] = np.minimum(accepted + 1, length)
        if done.any():
            self._begin(rows[done], chosen[~within])
        self._leave(rows, before)

    def _leave(self, rows: IntArray, before: IntArray) -> None:
        """Let rows go that have come to their end within what is newly known, places ``before`` to ``known``."""
        places = np.arange(self.n)
        new = (places >= before[:, None]) & (places < self.known[rows, None])
        ends = new & np.isin(self.content[rows], self.end_ids)
        finished = np.logical_or.reduce(ends, axis=1)
        full = (self.known[rows] == self.length[rows]) & (self.start[rows] + self.length[rows] == self.most)
        # From the last on: then the row that moves into the freed place stays.
        for i in np.flatnonzero(finished | full)[::-1].tolist():
            row, size = int(rows[i]), int(ends[i].argmax()) + 1 if finished[i] else int(self.length[rows[i]])
            written = self.text[row, self.prompt[row] : self.prompt[row] + self.start[row]]
            tokens = np.concatenate([written, self.content[row, :size]]).astype(np.int32)
            self.responses[int(self.member[row])] = Response(tokens, bool(finished[i]))
            self.active -= 1
            if row != self.active:
                self.cache.copy_row(self.active, row)
                state = (self.member, self.prompt, self.start, self.length, self.known, self.content, self.text)
                for array in state:
                    array[row] = array[self.active]
