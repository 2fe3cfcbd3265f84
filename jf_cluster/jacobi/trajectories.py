"""Jacobi trajectories of whole responses: every block of every response iterates at the same time.

A block's trajectory depends only on the clean prefix before it and on its initial guess, so the responses are run
through the model once to fill a key-value cache, and then each iteration forwards the unconverged tails of all blocks
as branches off it (``tails.py``): at most n iterations for a batch of responses instead of one sequence of forwards a
block.
``oracle.py`` holds the plain block-after-block form of the same algorithm.

The response is authoritative: whoever wrote it, an iterate's accepted prefix is judged against it and the token after
the accepted prefix becomes the response's, so a block of n tokens converges in at most n iterations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import Backend, branch_attention
from jf_cluster.jacobi.layout import CachedRows
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling, initial_guess
from jf_cluster.jacobi.tails import lay_out
from jf_cluster.jacobi.traces import FlatModel, Iterates, Trace

WAVE_TOKENS = 16384
"""Tokens of clean streams whose keys and values are held at once (more where a forward pass holds more)."""


@torch.inference_mode()
def trace(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    responses: Sequence[IntArray],
    *,
    block_size: int,
    keys: Sequence[int],
    forward_tokens: int = 2048,
    sampling: Sampling = GREEDY,
    backend: Backend = "auto",
) -> list[Trace]:
    """Iterate every block of every response to its fixed point.

    Args:
        prompts: token ids, int [P] each.
        responses: token ids the trajectories lead to, int [T] each, the end token included; may be empty.
        block_size: n; the last block of a response holds what is left.
        keys: a ``prompt_key`` for each prompt.
        forward_tokens: most tokens in one forward pass (a longer stream, or a larger block, still goes in one).
            Beyond a few thousand more is not faster on CPU: activations should stay in the processor's cache.

    Returns:
        One trace a response, in order.
    """
    results: dict[int, Trace] = {}
    with branch_attention(model, backend):
        for members in _groups(
            [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], max(forward_tokens, WAVE_TOKENS)
        ):
            # The most blocks first: then the rows that have a j-th block are the first ones for every j.
            members = sorted(members, key=lambda i: -len(responses[i]))
            wave = _Wave(
                [prompts[i] for i in members],
                [responses[i] for i in members],
                block_size,
                FlatModel(model, sampling, [keys[i] for i in members]),
                forward_tokens,
            )
            for member, result in zip(members, wave.run(), strict=True):
                results[member] = result
    return [results[i] for i in range(len(prompts))]


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split into groups of similar length whose padded size stays within the budget."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class _Wave:
    """One group of responses: its cache and the state of its blocks, as arrays over all ``N`` blocks.

    Blocks are numbered by column from the last to the first: all rows' last possible block, …, all rows' first.
    """

    def __init__(
        self,
        prompts: Sequence[IntArray],
        responses: Sequence[IntArray],
        block_size: int,
        model: FlatModel,
        forward_tokens: int,
    ) -> None:
        self.model, self.n, self.forward_tokens = model, block_size, forward_tokens
        self.prompts = [np.asarray(p, dtype=np.int64) for p in prompts]
        self.responses = [np.asarray(r, dtype=np.int64) for r in responses]
        self.stem = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        counts = np.array([-(-len(r) // block_size) for r in self.responses])
        columns = range(int(counts.max(initial=0)) - 1, -1, -1)
        self.row = np.concatenate([np.zeros(0, np.int64), *(np.flatnonzero(counts > j) for j in columns)])
        self.column = np.repeat(list(columns), [int((counts > j).sum()) for j in columns]).astype(np.int64)
        self.start = self.column * block_size
        response_length = np.array([len(r) for r in self.responses], dtype=np.int64)[self.row]
        self.length = np.minimum(block_size, response_length - self.start)
        self.prompt_length = np.array([len(p) for p in self.prompts])[self.row]
        self.fixed = np.zeros((len(self.row), block_size), dtype=np.int64)
        for block, (row, start, length) in enumerate(zip(self.row, self.start, self.length, strict=True)):
            self.fixed[block, :length] = self.responses[row][start : start + length]

    def run(self) -> list[Trace]:
        disagreements = self._fill_cache()
        iterates = Iterates()
        content = self._guesses()
        prefix = self._accepted(content)
        while (active := np.flatnonzero(prefix < self.length)).size:
            iterates.add(self.row[active], self.column[active], prefix[active], content[active], self.length[active])
            content = self._iterate(content, prefix, active)
            prefix = self._accepted(content)
        return iterates.traces([len(r) for r in self.responses], self.n, disagreements)

    def _guesses(self) -> IntArray:
        content = self.fixed.copy()
        for block, (row, column, length) in enumerate(zip(self.row, self.column, self.length, strict=True)):
            context = np.concatenate([self.prompts[row], self.responses[row][: column * self.n]])
            guess = initial_guess(int(self.model.keys[row]), int(column), context, self.n)
            # The first token is known from the prefix.
            content[block, 1:length] = guess[1:length]
        return content

    def _accepted(self, content: IntArray) -> IntArray:
        """Length of the leading part of each block that equals the fixed point, int64 [N]."""
        places = np.arange(self.n)[None, :]
        differs = (content != self.fixed) & (places < self.length[:, None])
        prefix: IntArray = np.where(differs.any(1), differs.argmax(1), self.length)
        return prefix

    def _fill_cache(self) -> IntArray:
        """Run the clean streams through the model once; count response tokens that are not its own choice, [S]."""
        self.cache = self.model.cache(len(self.stem), int(self.stem.max()))
        counts = []
        rows = max(1, self.forward_tokens // int(self.stem.max()))
        for first in range(0, len(self.stem), rows):
            counts.append(self._fill_rows(slice(first, min(first + rows, len(self.stem)))))
        return np.concatenate(counts)

    def _fill_rows(self, rows: slice) -> IntArray:
        stem, prompts, responses = self.stem[rows], self.prompts[rows], self.responses[rows]
        tokens = np.concatenate([np.concatenate(pair) for pair in zip(prompts, responses, strict=True)])
        layout, row, slot = CachedRows.of_stems(self.cache.part(rows), stem)
        offset = np.concatenate([[0], np.cumsum(stem)[:-1]])
        # The flat index whose logits choose each response token.
        before = np.concatenate(
            [o + len(p) - 1 + np.arange(len(r)) for o, p, r in zip(offset, prompts, responses, strict=True)]
        ).astype(np.int64)
        logits = self.model.forward(tokens, slot, layout, before)
        owner = row[before]
        place = slot[before] + 1 - np.array([len(p) for p in prompts])[owner]
        chosen = self.model.choose(logits, owner + rows.start, place)
        return np.bincount(owner, weights=chosen != np.concatenate(responses), minlength=len(stem)).astype(int)

    def _iterate(self, content: IntArray, prefix: IntArray, active: IntArray) -> IntArray:
        """One Jacobi iteration of the active blocks: only tokens from the first divergence on are forwarded."""
        old, content = content, content.copy()
        content[active, prefix[active]] = self.fixed[active, prefix[active]]
        places = np.arange(self.n)[None, :]
        # Forwarding place t chooses place t + 1; the one at `prefix` was just taken from the response, but what the
        # old iterate held there is what the later places are conditioned on.
        chosen = (places >= prefix[active, None]) & (places < self.length[active, None] - 1)
        # Whole blocks of about `forward_tokens` together: a forward that stays in the processor's cache is faster.
        parts = np.cumsum(chosen.sum(1)) // self.forward_tokens
        for part in np.split(np.arange(len(active)), np.flatnonzero(np.diff(parts)) + 1):
            which, place = np.nonzero(chosen[part])
            if not which.size:
                continue
            block = active[part][which]
            slot = (self.prompt_length + self.start)[block] + place
            layout, order = lay_out(
                self.cache, self.column[block], self.row[block], slot, block, self.model.heads_together
            )
            block, place = block[order], place[order]
            logits = self.model.forward(old[block, place], slot[order], layout, None)
            content[block, place + 1] = self.model.choose(logits, self.row[block], self.start[block] + place + 1)
        return content
