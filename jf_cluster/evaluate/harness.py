"""The decoder as a model of the EleutherAI lm-evaluation-harness: any task whose generation settings it has.

``python -m jf_cluster.evaluate.harness run --model jacobi --model_args pretrained=DIRECTORY --tasks gsm8k`` is the
harness's own command line with one model more; it needs ``pip install "jf-cluster[lm-eval]"``. The model takes what the
harness's ``hf`` takes, and ``drafting``, ``block_size``, ``blocks``, ``spawn_ratio``, ``pool``. Tasks that score given
continuations are answered by the checkpoint as by any other; tasks that generate use the decoder, and the results tell
the tokens per forward.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from jf_cluster.jacobi.calibration import AUTO, Auto
from jf_cluster.jacobi.decoding import generate
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import GREEDY, Sampling, prompt_key
from jf_cluster.models import end_ids

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f'the evaluation harness is not installed ({error}): pip install "jf-cluster[lm-eval]"'
    ) from error

logger = logging.getLogger("lm_eval")  # whose messages the harness shows

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
"""Generation settings that tasks state although these values change nothing."""


@register_model("jacobi")
class JacobiLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model, generating with this project's decoder."""

    def __init__(
        self,
        pretrained: str,
        drafting: str = "jacobi",
        block_size: int = 16,
        blocks: int = 2,
        spawn_ratio: float = 0.85,
        pool: int = 4,
        seed: int = 0,
        **others: Any,
    ) -> None:
        """See ``Drafting``; ``drafting="auto"`` takes what a calibration found fastest on this machine."""
        super().__init__(pretrained, backend="causal", **others)
        self.drafting: Drafting | Auto = (
            AUTO if drafting == AUTO else Drafting(drafting, block_size, blocks, spawn_ratio, pool)  # type: ignore[arg-type]
        )
        if (penalty := self.model.generation_config.repetition_penalty) not in (None, 1.0):
            logger.warning(
                "the checkpoint's own generation settings have a repetition penalty of %s, which --model hf applies "
                "and the decoder does not have: answers will differ from hf's",
                penalty,
            )
        self.seed = seed
        self.tokens = self.forwards = 0

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:  # fmt: skip
        """Continue prompts [B, P], padded on the left, up to ``max_length``; ids [B, P + T], padded on the right.

        Raises:
            ValueError: a generation setting that the decoder does not have.
        """
        mask = settings.pop("attention_mask")
        sampling = self._sampling(settings)
        prompts = [row[seen.bool()].tolist() for row, seen in zip(context, mask, strict=True)]
        made = generate(
            self.model,
            prompts,
            max_new_tokens=max_length - context.shape[1],
            end_ids=end_ids(self.model, self.tokenizer),
            drafting=self.drafting,
            sampling=sampling,
            keys=[prompt_key(self.seed, 0, ",".join(map(str, p))) for p in prompts],
            stop=[s for s in stop if s],
            decode=self.tokenizer.decode,
        )
        self.tokens += sum(len(g.tokens) - 1 for g in made)
        self.forwards += sum(g.forwards for g in made)
        longest = max(len(g.tokens) for g in made)
        padding = self.tokenizer.pad_token_id
        rows = torch.tensor([g.tokens + [padding] * (longest - len(g.tokens)) for g in made], device=context.device)
        return torch.cat([context, rows], dim=1)

    @staticmethod
    def _sampling(settings: dict[str, Any]) -> Sampling:
        temperature = float(settings.pop("temperature", 0.0) or 0.0)
        sampled = settings.pop("do_sample", temperature > 0)
        shaping = {name: settings.pop(name) for name in ("top_p", "top_k") if name in settings}
        unknown = {name: value for name, value in settings.items() if NEUTRAL.get(name) != value}
        if unknown:
            raise ValueError(f"the decoder has no generation settings {unknown}: change the task, or use --model hf")
        return Sampling(temperature or 1.0, **shaping) if sampled else GREEDY

    def get_model_info(self) -> dict[str, Any]:
        """What the harness keeps beside the results."""
        tpf = self.tokens / self.forwards if self.forwards else 1.0
        logger.info("%s: %.2f tokens per forward over %d tokens", self.drafting, tpf, self.tokens)
        return {
            **super().get_model_info(),
            "drafting": str(self.drafting),
            "tokens_per_forward": tpf,
            "response_tokens": self.tokens,
        }


if __name__ == "__main__":
    cli_evaluate()
