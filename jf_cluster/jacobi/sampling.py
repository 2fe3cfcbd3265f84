"""What makes guesses and samples repeatable: counter-based randomness keyed by prompt, block and position.

Every random choice is a pure function of a key and a place, so a trajectory or a sample is the same whichever
worker, batch, decoding mode or retry produces it. At temperature 0 the next token is the argmax of the logits; above
it, the argmax of ``logits / temperature`` plus Gumbel noise keyed by (key, response position), which makes it an exact
sample and the Jacobi map deterministic again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

LOGITS_AT_A_TIME = 1 << 24
"""A sample takes some 36 bytes a logit while it is drawn, and collecting draws for tens of thousands of positions."""

# SplitMix64's constants (Steele, Lea, Flood 2014) as signed 64-bit integers.
_GOLDEN, _MIX1, _MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def prompt_key(seed: int, round_number: int, prompt_id: str) -> int:
    """The 63-bit key of a prompt's randomness in a round."""
    digest = hashlib.blake2b(f"{seed}:{round_number}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initial_guess(key: int, block: int, context: IntArray, length: int) -> IntArray:
    """Tokens a block starts from: ``length`` draws from the prompt's and earlier response's tokens, int64 [length]."""
    raw = np.random.Philox(key=np.array([key, block], dtype=np.uint64)).random_raw(length)
    return context[(raw % np.uint64(len(context))).astype(np.int64)]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave logits alone."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:  # a NaN is neither
            raise ValueError(f"{self}: temperature and top_k must be at least 0, top_p must lie in (0, 1]")

    def choose(self, logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Give the next tokens, int64 [N], from logits [N, V], prompt keys and response positions (int64 [N] each)."""
        if self.temperature == 0:
            return most_likely(logits)
        rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
        parts = zip(*(torch.split(x, rows) for x in (logits, keys, positions)), strict=True)
        return torch.cat([self._drawn(*part) for part in parts])

    def _drawn(self, logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scaled = self._filter(logits.float() / self.temperature)
        return most_likely(scaled + gumbel(keys, positions, logits.shape[-1]))

    def _filter(self, logits: torch.Tensor) -> torch.Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            floor = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            # A token stays while the probability before it is below top_p, so the most likely one always stays.
            probabilities = ordered.softmax(-1)
            dropped = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.scatter(-1, order, ordered.masked_fill(dropped, -torch.inf))
        return logits


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Give the argmax of logits [..., V], int64 [...], the first of several; on a CPU without ``argmax``, which takes
    three to four times as long as ``max`` there."""
    return logits.argmax(-1) if logits.is_cuda else logits.max(-1).indices


GREEDY = Sampling()
"""The most likely token, always."""


def gumbel(keys: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [N, V], a pure function of key, response position and token (int64 [N] each)."""
    place = _mix(_mix(keys) + positions * _GOLDEN)
    tokens = torch.arange(vocab_size, device=keys.device)
    bits = _mix(place[:, None] + tokens[None, :] * _GOLDEN)
    uniform = ((bits >> 11 & (1 << 53) - 1).double() + 0.5) / 2.0**53
    noise: torch.Tensor = -(-uniform.log()).log()
    return noise.float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 (arithmetic wraps; shifts are made logical by masking)."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)
