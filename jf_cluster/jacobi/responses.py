"""Who writes the responses: batched generation behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling


@dataclass(frozen=True)
class Response:
    """What a model wrote after a prompt: int32 [T], the end token included when ``finished``."""

    tokens: NDArray[np.int32]
    finished: bool


class Writer(Protocol):
    """Writes one response a prompt, as :func:`generate_responses` of one model does."""

    def __call__(
        self,
        prompts: Sequence[IntArray],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        sampling: Sampling = ...,
        keys: Sequence[int] | None = None,
    ) -> list[Response]: ...


def generate_responses(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    keys: Sequence[int] | None = None,
) -> list[Response]:
    """Write one response a prompt, autoregressively and batched; finished rows leave the batch.

    Raises:
        PromptError: an empty prompt, or one that leaves no room for ``max_new_tokens``.
    """
    written = generate(
        model,
        [p.tolist() for p in prompts],
        max_new_tokens=max_new_tokens,
        end_ids=end_ids,
        drafting=AUTOREGRESSIVE,
        sampling=sampling,
        keys=keys,
    )
    return [Response(np.array(g.tokens, dtype=np.int32), g.finished) for g in written]
