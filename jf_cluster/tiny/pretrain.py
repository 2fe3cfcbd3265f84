"""Makes the embedded run's tokenizer and base model from nothing: what ``make tiny-base`` runs.

The base is an ordinary causal language model trained on prompt and worked solution with next-token cross-entropy
on the solution alone. Matrices of the blocks are trained with Muon, everything else with AdamW, in
cycles that each end with a rate of zero. Weights are saved in bfloat16 to stay small in the repository and
are measured after that rounding, so the accuracy printed is the shipped model's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.tiny.problems import parse_answer, problem, problems

logger = logging.getLogger(__name__)

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's own pre-tokenizer pattern: every digit is a token of its own."""

CYCLES = ["2600:0.015:2e-3:1"]
"""How the shipped base was trained: steps, Muon's rate, AdamW's rate and the seed of the problems of each cycle."""


def build_tokenizer(vocab_size: int = 768, examples: int = 20_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen2's splitting rule on generated problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (f"{p.question}\n{p.solution}" for p in itertools.islice(problems("train", seed=0), examples))
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocab_size: int, hidden_size: int = 192, layers: int = 6, seed: int = 0) -> Qwen2ForCausalLM:
    """Give a freshly initialised Qwen2-architecture model of a few million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Token ids of a question as the model is prompted with it."""
    return tokenizer.encode(f"{USER}{question}{ASSISTANT}", add_special_tokens=False)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, tokens_per_batch: int, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(input_ids[B, T], labels[B, T])`` int64 without end; problems of similar length share a batch."""
    source, rng, pool_size = problems("train", seed, start), random.Random(seed), 2048
    while True:
        pool = []
        for p in itertools.islice(source, pool_size):
            prompt = encode(tokenizer, p.question)
            response = [*tokenizer.encode(p.solution, add_special_tokens=False), tokenizer.eos_token_id]
            pool.append((prompt, response))
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups, group, width = [], [], 0
        for pair in pool:
            width = max(width, len(pair[0]) + len(pair[1]))
            if group and width * (len(group) + 1) > tokens_per_batch:
                groups.append(group)
                group, width = [], len(pair[0]) + len(pair[1])
            group.append(pair)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(p) + len(r) for p, r in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            labels = torch.full((len(group), width), -100)
            for row, (p, r) in enumerate(group):
                ids[row, : len(p) + len(r)] = torch.tensor(p + r)
                labels[row, len(p) : len(p) + len(r)] = torch.tensor(r)
            yield ids, labels


@torch.inference_mode()
def accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> float:
    """Share of ``count`` held-out problems whose greedy answer is right."""
    model.eval()
    chosen = [problem("heldout", seed, i) for i in range(count)]
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, count, 100):
        part = chosen[start : start + 100]
        encoded = tokenizer([f"{USER}{p.question}{ASSISTANT}" for p in part], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=220, do_sample=False
        )
        texts = tokenizer.batch_decode(out[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        right += sum(parse_answer(text) == p.answer for text, p in zip(texts, part, strict=True))
    model.train()
    return right / count


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    matrix_rate: float,
    other_rate: float,
    tokens_per_step: int,
    seed: int,
) -> None:
    """Train for one cycle: warm-up, a constant rate, a linear fall to zero over the last 40% of it."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 50, (steps - s) / (0.4 * steps)))
        for o in optimizers
    ]
    begun = time.monotonic()
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, seed, tokens_per_step), steps)):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedulers, strict=True):
            o.step()
            s.step()
            o.zero_grad(set_to_none=True)
        if step % 50 == 0:
            logger.info("step %d of %d: loss %.4f, %.0f s", step, steps, loss.item(), time.monotonic() - begun)


def main() -> None:
    """Train cycle after cycle; each cycle's model is saved, so a later one can be added with --start."""
    parser = argparse.ArgumentParser(
        description="Train the embedded run's tokenizer and base model from nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory the model is written to")
    parser.add_argument("--start", type=Path, help="continue from this model instead of from nothing")
    parser.add_argument(
        "--cycle",
        dest="cycles",
        action="append",
        metavar="STEPS:MATRIX_RATE:OTHER_RATE:SEED",
        help=f"a training cycle; may be given several times (default: {' '.join(CYCLES)})",
    )
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = Qwen2ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer()
        model = build_model(len(tokenizer), seed=args.seed)
    cycles = args.cycles or CYCLES
    for cycle in cycles:
        steps, matrix_rate, other_rate, seed = cycle.split(":")
        model.train()
        train(
            model,
            tokenizer,
            steps=int(steps),
            matrix_rate=float(matrix_rate),
            other_rate=float(other_rate),
            tokens_per_step=args.tokens_per_step,
            seed=int(seed),
        )
        logger.info("cycle %s: held-out accuracy %.3f of 200", cycle, accuracy(model, tokenizer, 200))
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.output)
    result = {"accuracy_heldout": accuracy(model.float(), tokenizer, 1000), "problems": 1000, "cycles": cycles}
    (args.output / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    logger.info("saved %s: %s", args.output, result)


if __name__ == "__main__":
    main()
