"""Jacobi trajectories of whole responses: every block of every response iterates at the same time.

A block's trajectory depends only on the clean prefix before it and on its initial guess, so the responses are run
through the model once to fill a key-value cache, and then each forward pass carries the unconverged tails of all
blocks as branches off it: at most n forwards for a batch of responses instead of one sequence of forwards a block.
``oracle.py`` holds the plain block-after-block form of the same algorithm.

The response is authoritative: whoever wrote it, an iterate's accepted prefix is judged against it and the token after
the accepted prefix becomes the response's, so a block of n tokens converges in at most n iterations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import Backend, branch_attention
from jf_cluster.jacobi.cache import KeyValueCache
from jf_cluster.jacobi.layout import CachedRows, visible
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling, initial_guess

Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class Trace:
    """All iterates of one response's blocks, as ``trajectory_store.Trajectory`` stores them.

    ``disagreements`` counts response tokens that are not the model's own choice on the clean prefix: 0 in float32 for a
    response the model wrote itself, rounding in low precision, drift where another model wrote the response.
    """

    iterations: Int32Array
    accepted: Int32Array
    tails: Int32Array
    disagreements: int


@torch.inference_mode()
def trace(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    responses: Sequence[IntArray],
    *,
    block_size: int,
    keys: Sequence[int],
    forward_tokens: int = 8192,
    sampling: Sampling = GREEDY,
    backend: Backend = "auto",
) -> list[Trace]:
    """Iterate every block of every response to its fixed point.

    Args:
        prompts: token ids, int [P] each.
        responses: token ids the trajectories lead to, int [T] each, the end token included; may be empty.
        block_size: n; the last block of a response holds what is left.
        keys: a ``prompt_key`` for each prompt.
        forward_tokens: most tokens in one forward pass (a single longer response still goes in one).

    Returns:
        One trace a response, in order.
    """
    results: dict[int, Trace] = {}
    with branch_attention(model, backend):
        for members in _groups([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], forward_tokens):
            wave = _Wave(model, [prompts[i] for i in members], [responses[i] for i in members], block_size, sampling)
            for member, result in zip(members, wave.run([keys[i] for i in members]), strict=True):
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
    """One group of responses: its cache and the state of its blocks, as arrays over all ``N`` blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[IntArray],
        responses: Sequence[IntArray],
        block_size: int,
        sampling: Sampling,
    ) -> None:
        self.model, self.sampling, self.n = model, sampling, block_size
        self.prompts = [np.asarray(p, dtype=np.int64) for p in prompts]
        self.responses = [np.asarray(r, dtype=np.int64) for r in responses]
        self.stem = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        counts = [-(-len(r) // block_size) for r in self.responses]
        self.row = np.repeat(np.arange(len(counts)), counts)
        self.start = np.concatenate([np.arange(c) * block_size for c in counts] or [np.zeros(0, int)]).astype(np.int64)
        response_length = np.array([len(r) for r in self.responses], dtype=np.int64)[self.row]
        self.length = np.minimum(block_size, response_length - self.start)
        self.prompt_length = np.array([len(p) for p in self.prompts])[self.row]
        self.fixed = np.zeros((len(self.row), block_size), dtype=np.int64)
        for block, (row, start, length) in enumerate(zip(self.row, self.start, self.length, strict=True)):
            self.fixed[block, :length] = self.responses[row][start : start + length]

    def run(self, keys: Sequence[int]) -> list[Trace]:
        self.keys = np.array(keys, dtype=np.int64)
        disagreements = self._fill_cache()
        blocks, steps, accepted, tails = [], [], [], []
        content = self._guesses()
        prefix = self._accepted(content)
        step = 0
        while (active := np.flatnonzero(prefix < self.length)).size:
            inside = np.arange(self.n)[None, :] < self.length[active, None]
            blocks.append(active)
            steps.append(np.full(len(active), step))
            accepted.append(prefix[active])
            tails += [c[p:e] for c, p, e in zip(content[active], prefix[active], inside.sum(1), strict=True)]
            content = self._iterate(content, prefix, active)
            prefix = self._accepted(content)
            step += 1
        return self._assemble(blocks, steps, accepted, tails, disagreements)

    def _assemble(
        self,
        blocks: list[IntArray],
        steps: list[IntArray],
        accepted: list[IntArray],
        tails: list[IntArray],
        disagreements: IntArray,
    ) -> list[Trace]:
        block, step = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (blocks, steps))
        prefix = np.concatenate(accepted) if accepted else np.zeros(0, np.int64)
        order = np.lexsort((step, block))
        rows = self.row[block[order]]
        iterations = np.bincount(block, minlength=len(self.row))
        out = []
        for row in range(len(self.responses)):
            mine = order[rows == row]
            tail = np.concatenate([tails[i] for i in mine]) if mine.size else np.zeros(0, np.int64)
            out.append(
                Trace(
                    iterations[self.row == row].astype(np.int32),
                    prefix[mine].astype(np.int32),
                    tail.astype(np.int32),
                    int(disagreements[row]),
                )
            )
        return out

    def _guesses(self) -> IntArray:
        content = self.fixed.copy()
        for block, (row, start, length) in enumerate(zip(self.row, self.start, self.length, strict=True)):
            context = np.concatenate([self.prompts[row], self.responses[row][:start]])
            guess = initial_guess(int(self.keys[row]), int(start) // self.n, context, self.n)
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
        model, device = self.model, self.model.device
        scratch = max((int(self.length[self.row == r].sum()) for r in range(len(self.stem))), default=0)
        self.cache = KeyValueCache(
            model.config, len(self.stem), int(self.stem.max()) + scratch, dtype=model.dtype, device=device
        )
        tokens = np.concatenate([np.concatenate(pair) for pair in zip(self.prompts, self.responses, strict=True)])
        row = np.repeat(np.arange(len(self.stem)), self.stem)
        slot = np.concatenate([np.arange(n) for n in self.stem])
        offset = np.concatenate([[0], np.cumsum(self.stem)[:-1]])
        # The flat index whose logits choose each response token.
        before = np.concatenate(
            [o + len(p) - 1 + np.arange(len(r)) for o, p, r in zip(offset, self.prompts, self.responses, strict=True)]
        ).astype(np.int64)
        logits = self._forward(tokens, row, slot, slot, None, before)
        owner = row[before]
        place = slot[before] + 1 - np.array([len(p) for p in self.prompts])[owner]
        chosen = self._choose(logits, owner, place)
        return np.bincount(owner, weights=chosen != np.concatenate(self.responses), minlength=len(self.stem)).astype(
            int
        )

    def _iterate(self, content: IntArray, prefix: IntArray, active: IntArray) -> IntArray:
        """One Jacobi iteration of the active blocks: only tokens from the first divergence on are forwarded."""
        old, content = content, content.copy()
        content[active, prefix[active]] = self.fixed[active, prefix[active]]
        places = np.arange(self.n)[None, :]
        # Forwarding place t chooses place t + 1; the one at `prefix` was just taken from the response, but what the
        # old iterate held there is what the later places are conditioned on.
        chosen = (places >= prefix[active, None]) & (places < self.length[active, None] - 1)
        which, place = np.nonzero(chosen)
        if not which.size:
            return content
        block = active[which]
        first = np.concatenate([[True], block[1:] != block[:-1]])
        branch = np.cumsum(first) - 1
        row = self.row[block]
        rank = np.arange(len(block)) - np.searchsorted(row, row)
        slot = self.stem[row] + rank
        logits = self._forward(
            old[block, place],
            row,
            slot,
            (self.prompt_length + self.start)[block] + place,
            ((self.prompt_length + self.start + prefix)[block], slot[first][branch]),
            None,
        )
        content[block, place + 1] = self._choose(logits, row, self.start[block] + place + 1)
        return content

    def _forward(
        self,
        tokens: IntArray,
        row: IntArray,
        slot: IntArray,
        position: IntArray,
        branch: tuple[IntArray, IntArray] | None,
        keep: IntArray | None,
    ) -> torch.Tensor:
        """Forward flat tokens (sorted by row) over the cache; logits [kept, V]."""
        device = self.model.device
        count = np.bincount(row, minlength=len(self.stem))
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        width = int(count.max())
        fill = np.zeros((len(self.stem), width), dtype=np.int64)
        fill[row, rank] = np.arange(len(row))
        reach = int(slot.max()) + 1
        mask = None
        if branch is not None:
            stem_end, own_begin = (np.zeros_like(fill) for _ in range(2))
            own_end = np.zeros_like(fill)  # Padding sees slot 0 alone: a softmax over nothing is not a number.
            stem_end[row, rank], own_begin[row, rank], own_end[row, rank] = branch[0], branch[1], slot
            end, own, last = (torch.from_numpy(a).to(device)[:, :, None] for a in (stem_end, own_begin, own_end))
            mask = visible(torch.zeros_like(end), end, own, last, torch.arange(reach, device=device))[:, None]
        layout = CachedRows(
            self.cache,
            torch.from_numpy(row).to(device),
            torch.from_numpy(slot).to(device),
            mask=mask,
            reach=reach,
            fill=torch.from_numpy(fill).to(device),
            pick=torch.from_numpy(row * width + rank).to(device),
            causal=branch is None,
        )
        out = self.model(
            input_ids=torch.from_numpy(tokens).to(device)[None],
            position_ids=torch.from_numpy(position).to(device)[None],
            use_cache=False,
            layout=layout,
            logits_to_keep=0 if keep is None else torch.from_numpy(keep).to(device),
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _choose(self, logits: torch.Tensor, row: IntArray, place: IntArray) -> IntArray:
        device = logits.device
        keys, places = (torch.from_numpy(a).to(device) for a in (self.keys[row], place))
        chosen: IntArray = self.sampling.choose(logits, keys, places).cpu().numpy()
        return chosen
