"""What the benchmarks run on: the project's own model and held-out problems, or random weights at given shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from jf_cluster.jacobi.sampling import IntArray
from jf_cluster.tiny.problems import problem

TINY = Path(__file__).parent.parent / "jf_cluster" / "tiny" / "base"

RUN = Path("runs/tiny/models")
"""Where ``make train`` puts the trained models."""


def trained() -> Path:
    """The newest round's export of the embedded run under the working directory; the base where there is none yet."""
    return max(RUN.glob("round-[0-9][0-9][0-9]"), default=TINY)


def load(path: str | Path, device: str) -> PreTrainedModel:
    """A model in float32, ready to decode."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)


def prompts(path: str | Path, count: int) -> tuple[list[IntArray], int]:
    """Held-out problems as token ids under the model's chat template, and the end token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for index in range(count):
        message = [{"role": "user", "content": problem("heldout", 0, index).question}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        rows.append(np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64))
    return rows, tokenizer.eos_token_id
