"""Responses written by vLLM on a GPU: the same interface as ``responses.py``, another engine. An optional extra.

vLLM holds its own copy of the weights and its own cache beside the model that traces, so ``memory_share`` must leave
room for that one. It writes greedily only: its sampler knows no keyed noise, and a sampled response must be the one
the keys give. In low precision its argmax may differ from the tracing model's in near ties; such tokens are counted as
disagreements, as always, and the response stays authoritative. Written against vLLM's documented interface, tested with
a stand-in for it, and not run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jf_cluster.jacobi.responses import Response
from jf_cluster.jacobi.sampling import GREEDY, IntArray, Sampling


class UnsupportedSamplingError(ValueError):
    """A way of sampling this engine cannot repeat from keys."""


class VllmWriter:
    """A vLLM engine that writes responses; called like ``generate_responses`` without the model."""

    def __init__(self, model: str | Path, *, dtype: str, context: int, memory_share: float = 0.45) -> None:
        """Load ``model`` (a directory or a hub id) for prompts and responses of up to ``context`` tokens together.

        Raises:
            ImportError: vLLM is not installed.
        """
        from vllm import LLM

        self._engine: Any = LLM(
            model=str(model), dtype=dtype, max_model_len=context, gpu_memory_utilization=memory_share,
            skip_tokenizer_init=True,
        )  # fmt: skip

    def __call__(
        self,
        prompts: Sequence[IntArray],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        keys: Sequence[int] | None = None,
    ) -> list[Response]:
        """Write one response a prompt, in order; the end token is part of a finished one.

        Raises:
            UnsupportedSamplingError: a temperature above 0.
        """
        if sampling != GREEDY:
            raise UnsupportedSamplingError(f"vLLM writes greedily here, not with {sampling}: use the built-in loop")
        from vllm import SamplingParams

        wanted = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(end_ids), ignore_eos=True, detokenize=False
        )
        outputs = self._engine.generate([{"prompt_token_ids": p.tolist()} for p in prompts], wanted, use_tqdm=False)
        return [_response(output.outputs[0], end_ids) for output in outputs]


def _response(output: Any, end_ids: Sequence[int]) -> Response:
    tokens = list(output.token_ids)
    finished = output.finish_reason == "stop"
    if finished and tokens[-1] not in end_ids:
        # Versions differ in whether the stop token is among the tokens; which one it was is always told.
        tokens.append(int(output.stop_reason))
    return Response(np.array(tokens, dtype=np.int32), finished)
