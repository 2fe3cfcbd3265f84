"""What one decoding row proposes and accepts: drafts, blocks in flight and the n-gram pool of rejection recycling.

No tensors here. A row's sequence is prompt, accepted response, then ``draft``: tokens proposed to follow the last
accepted one. After a forward the row learns what the model writes after every proposed token (``advance``), accepts
the longest matching run plus the one token the model wrote behind it, and keeps the rest as its next draft.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling
from jf_cluster.jacobi.text import TextStream

Mode = Literal["ar", "jacobi", "multiblock"]
Reason = Literal["end", "stop", "length"]
"""Why a response is over: an end token, a stop string, or ``max_new_tokens``."""


@dataclass(frozen=True)
class Drafting:
    """How drafts are made."""

    mode: Mode = "jacobi"
    block_size: int = 16
    """n: tokens of a Jacobi draft with the last accepted one, and of a block."""
    blocks: int = 2
    """K: blocks in flight."""
    spawn_ratio: float = 0.85
    """r: share of the first block that must be accepted before another one starts behind, in whole tokens, rounded
    down."""
    pool: int = 4
    """Recycled n-grams verified beside the draft."""
    gram: int = 4
    """Most tokens of each: longer ones hardly add accepted tokens, but make every forward dearer."""

    def __post_init__(self) -> None:
        if self.mode not in ("ar", "jacobi", "multiblock"):
            raise ValueError(f"unknown decoding mode {self.mode!r}; choose ar, jacobi or multiblock")
        if min(self.block_size, self.blocks, self.gram) < 1 or not 0 <= self.spawn_ratio <= 1 or self.pool < 0:
            raise ValueError(
                f"{self}: block_size, blocks and gram must be at least 1, spawn_ratio in [0, 1], pool at least 0"
            )

    @property
    def candidates(self) -> int:
        """Recycled candidates verified beside a draft."""
        return self.pool if self.mode == "multiblock" else 0

    @property
    def longest(self) -> int:
        """Most tokens of a row in one forward pass."""
        n = self.block_size
        draft = {"ar": 0, "jacobi": n - 1, "multiblock": n * self.blocks}[self.mode]
        return 1 + draft + self.candidates * self.gram


AUTOREGRESSIVE, JACOBI = Drafting("ar"), Drafting("jacobi")


class NgramPool:
    """Runs of tokens seen in discarded drafts, newest first, by the token before them."""

    def __init__(self, per_token: int, length: int) -> None:
        self.per_token, self.length = per_token, length
        self._runs: dict[int, deque[tuple[int, ...]]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Remember every run of up to ``length`` tokens of a discarded draft."""
        for i in range(len(tokens) - 1):
            run = tuple(tokens[i + 1 : i + 1 + self.length])
            runs = self._runs.setdefault(tokens[i], deque(maxlen=self.per_token))
            if run not in runs:
                runs.appendleft(run)

    def find(self, token: int) -> list[tuple[int, ...]]:
        """Candidates to follow ``token``."""
        return list(self._runs.get(token, ()))


@dataclass(eq=False)
class Row:
    """One response being decoded."""

    prompt: Sequence[int]
    key: int
    drafting: Drafting
    max_new_tokens: int
    end_ids: frozenset[int]
    sampling: Sampling = GREEDY
    text: TextStream | None = None
    """Reads the response for stop strings; None where there are none."""
    tokens: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    candidates: list[tuple[int, ...]] = field(default_factory=list)
    accepted_runs: list[int] = field(default_factory=list)
    """Tokens each forward added, the prefill's one first."""
    forwarded_tokens: int = 0
    """Tokens proposed to the model in all decode forwards, the last accepted one of each included."""
    reason: Reason | None = None
    prefill_seconds: float = 0.0
    elapsed: float = 0.0
    """Seconds of its decode steps; what a caller does between them is not in it."""

    def __post_init__(self) -> None:
        self._context = np.array(self.prompt, dtype=np.int64)
        self._random = np.random.Generator(np.random.Philox(key=self.key))
        self._pool = NgramPool(self.drafting.candidates, self.drafting.gram)
        self._blocks: deque[int] = deque()  # Unaccepted tokens of each block in flight, the real-active one first.

    @property
    def done(self) -> bool:
        return self.reason is not None

    @property
    def last_slot(self) -> int:
        """Cache slot, and position, of the last accepted token."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def proposed(self) -> list[int]:
        """Tokens of the next forward: the last accepted one, the draft, then the candidates one after the other."""
        return [self.tokens[-1], *self.draft, *(t for c in self.candidates for t in c)]

    @property
    def depths(self) -> IntArray:
        """How far behind the last accepted token each proposed one would stand, int64 [len(proposed)]."""
        return np.concatenate([np.arange(1 + len(self.draft)), *(np.arange(1, 1 + len(c)) for c in self.candidates)])

    @property
    def own_ranges(self) -> IntArray:
        """For each proposed token where its stem ends and where its own branch begins, int64 [2, len(proposed)].

        Both count from the last accepted token's slot. The draft is one branch with that token; a candidate's stem
        ends behind that token, because its branch begins further away in the cache.
        """
        sizes = [1 + len(self.draft), *map(len, self.candidates)]
        firsts = np.cumsum([0, *sizes[:-1]])
        return np.repeat(np.stack([firsts > 0, firsts]).astype(np.int64), sizes, axis=1)

    def begin(self, first: int) -> None:
        """Take the token the prefill wrote and make the first draft."""
        self._take([first])
        self._propose([])

    def advance(self, written: Sequence[int], candidates_written: Sequence[Sequence[int]]) -> tuple[int, int | None]:
        """Accept what the model confirmed and draft what comes next.

        Args:
            written: what the model writes after the last accepted token and after each draft token, 1 + len(draft).
            candidates_written: what it writes after each token of each candidate, given the last accepted token.

        Returns:
            ``(run, candidate)``: how many proposed tokens became part of the response and which candidate they came
            from (None: the draft). One more token, the model's own, follows them.
        """
        self.forwarded_tokens += len(written) + sum(map(len, candidates_written))
        run, rest, source = _match(self.draft, written), list(written), None
        for index, (candidate, after) in enumerate(zip(self.candidates, candidates_written, strict=True)):
            answers = [written[0], *after]
            if (match := _match(candidate, answers)) > run:
                # Behind the candidate's own answers the draft's still serve as guesses.
                run, rest, source = match, answers + list(written[len(answers) :]), index
        if self.drafting.candidates:
            self._pool.add(written)
        self._take(rest[: run + 1])
        self._propose(rest[run + 1 :])
        return run, source

    def _take(self, tokens: Sequence[int]) -> None:
        taken = list(tokens[: self.max_new_tokens - len(self.tokens)])
        reason: Reason | None = "length" if len(self.tokens) + len(taken) >= self.max_new_tokens else None
        for i, token in enumerate(taken):
            if token in self.end_ids:
                taken, reason = taken[: i + 1], "end"
                break
            if self.text is not None:
                self.text.push(token)
                if self.text.stopped is not None:
                    taken, reason = taken[: i + 1], "stop"
                    break
        self.tokens += taken
        self.reason = reason  # after the tokens: a server's other thread looks at both
        self.accepted_runs.append(len(taken))
        accepted = len(taken)
        while self._blocks and accepted >= self._blocks[0]:
            accepted -= self._blocks.popleft()
        if self._blocks:
            self._blocks[0] -= accepted

    def _propose(self, kept: Sequence[int]) -> None:
        """Make the next draft from what the model wrote behind the accepted run, topped up with guesses."""
        if self.done or self.drafting.mode == "ar":
            self.draft, self.candidates = [], []
            return
        n = self.drafting.block_size
        if self.drafting.mode == "jacobi":
            wanted = n - 1
        else:
            if not self._blocks:
                self._blocks.append(n)
            spawn_below = n - int(self.drafting.spawn_ratio * n)
            if self._blocks[0] <= spawn_below and len(self._blocks) < self.drafting.blocks:
                self._blocks.append(n)
            # Never less than Jacobi's draft: what is left of the last block is also a guess at what follows it.
            wanted = max(n - 1, sum(self._blocks))
        wanted = min(wanted, self.max_new_tokens - len(self.tokens))
        self.draft = list(kept[:wanted])
        if (missing := wanted - len(self.draft)) > 0:
            known = len(self._context)
            picks = self._random.integers(known + len(self.tokens), size=missing).tolist()
            self.draft += [int(self._context[i]) if i < known else self.tokens[i - known] for i in picks]
        if self.drafting.candidates:
            left = self.max_new_tokens - len(self.tokens)  # a position past them may be past the model's context
            found = [c[:left] for c in self._pool.find(self.tokens[-1])]
            self.candidates = [c for c in found if list(c) != self.draft[: len(c)]]


def _match(proposed: Sequence[int], written: Sequence[int]) -> int:
    """How many proposed tokens the model confirms: ``proposed[i]`` against ``written[i]``."""
    count = 0
    while count < len(proposed) and proposed[count] == written[count]:
        count += 1
    return count
