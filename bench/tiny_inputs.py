"""What the benchmarks run on: the project's own model and held-out problems, or random weights at given shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from jf_cluster.jacobi.sampling import IntArray
from jf_cluster.tiny.problems import Problem, problem

TINY = Path(__file__).parent.parent / "jf_cluster" / "tiny" / "base"

RUN = Path("runs/tiny/models")
"""Where ``make train`` puts the trained models."""


SHAPES = {
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
}
"""Models by their shapes alone, with random weights in bfloat16, for GPUs: width, inner width, layers, query heads,
key-value heads, vocabulary."""
SHAPE_PROMPT_TOKENS = 128


def default_model() -> str:
    """What is measured unless something else is asked for: a model a GPU has work with, the tiny one on a CPU."""
    return "qwen2.5-1.5b" if torch.cuda.is_available() else str(TINY)


def trained() -> str:
    """The newest round's export of the embedded run under the working directory; the default where there is none."""
    return str(max(RUN.glob("round-[0-9][0-9][0-9]"), default=default_model()))


def load(path: str | Path, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model ready to decode: a directory's in ``dtype``, or one of SHAPES."""
    if str(path) not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
    hidden, inner, layers, heads, groups, vocabulary = SHAPES[str(path)]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def prompts(path: str | Path, count: int) -> tuple[list[IntArray], int]:
    """Held-out problems as token ids under the model's chat template, and the end token; random ids for a shape."""
    if str(path) in SHAPES:
        random = np.random.default_rng(0)
        end = SHAPES[str(path)][-1] - 1  # the chance that random weights choose it is nil
        return [random.integers(0, end, SHAPE_PROMPT_TOKENS) for _ in range(count)], end
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [encode(tokenizer, problem("heldout", 0, index)) for index in range(count)], tokenizer.eos_token_id


def encode(tokenizer: PreTrainedTokenizerBase, p: Problem) -> IntArray:
    """Token ids a model is prompted with."""
    message = [{"role": "user", "content": p.question}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
