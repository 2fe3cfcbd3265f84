"""Makes the embedded run's tokenizer and base model from nothing: what ``make tiny-base`` runs.

The base is an ordinary causal language model trained on prompt and worked solution with next-token cross-entropy
on the solution alone. Matrices of the blocks are trained with Muon, everything else with AdamW, in
cycles that each end with a rate of zero. Weights are saved in bfloat16 to stay small in the repository and
are measured after that rounding, so the accuracy printed is the shipped model's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.tiny.problems import EMBEDDED, Difficulty, parse_answer, problem, problems
from jf_cluster.whole_files import write_whole

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


def build_model(
    vocab_size: int,
    hidden_size: int = 192,
    layers: int = 6,
    seed: int = 0,
    *,
    intermediate_size: int = 512,
    heads: int = 6,
    key_value_heads: int = 2,
) -> Qwen2ForCausalLM:
    """Give a freshly initialised Qwen2-architecture model, by default of a few million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
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


Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""``(input_ids[B, T], labels[B, T])``."""

POOL_PROBLEMS = 2048


class Pools(Dataset[list[Batch]]):
    """Batches by pools of problems: those of similar length share a batch, and a pool's batches ascend by length.

    A pool is a function of its number, so that any process may make it. Its batches are arrays, since tensors that
    change processes take two file descriptors a batch. What is left over in the end, a pool's longest problems, is a
    smaller batch where ``rest`` says so; the shipped base was trained without.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        tokens_per_batch: int,
        difficulty: Difficulty = EMBEDDED,
        rest: bool = False,
    ) -> None:
        self.tokenizer, self.seed, self.tokens_per_batch = tokenizer, seed, tokens_per_batch
        self.difficulty, self.rest, self.size = difficulty, rest, POOL_PROBLEMS

    def __getitem__(self, number: int) -> list[Batch]:
        pool = []
        for index in range(number * self.size, (number + 1) * self.size):
            p = problem("train", self.seed, index, self.difficulty)
            prompt = encode(self.tokenizer, p.question)
            response = [*self.tokenizer.encode(p.solution, add_special_tokens=False), self.tokenizer.eos_token_id]
            pool.append((prompt, response))
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups, group, width = [], [], 0
        for pair in pool:
            width = max(width, len(pair[0]) + len(pair[1]))
            if group and width * (len(group) + 1) > self.tokens_per_batch:
                groups.append(group)
                group, width = [], len(pair[0]) + len(pair[1])
            group.append(pair)
        return [self._batch(g) for g in ([*groups, group] if self.rest else groups)]

    def _batch(self, group: list[tuple[list[int], list[int]]]) -> Batch:
        width = max(len(p) + len(r) for p, r in group)
        ids = np.full((len(group), width), self.tokenizer.pad_token_id)
        labels = np.full((len(group), width), -100)
        for row, (p, r) in enumerate(group):
            ids[row, : len(p) + len(r)] = p + r
            labels[row, len(p) : len(p) + len(r)] = r
        return ids, labels

    def after(self, number: int, workers: int = 0) -> Iterable[list[Batch]]:
        """Pools without end from ``number`` on in their order, made by so many processes, or in this one."""
        return DataLoader(self, None, sampler=itertools.count(number), num_workers=workers, collate_fn=list)


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


LOG_STEPS = 50


class Cycle:
    """One training cycle: a warm-up, a constant rate, a linear fall to zero over the last 40% of it.

    With ``bf16`` the forward computes in bfloat16 where that is safe (autocast); weights stay in the model's type.
    """

    def __init__(
        self, model: Qwen2ForCausalLM, pools: Pools, *, matrix_rate: float, other_rate: float, bf16: bool = False
    ) -> None:
        self.model, self.pools, self.bf16 = model, pools, bf16
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01, momentum=0.95), matrix_rate),
            (torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0), other_rate),
        ]
        self.random = random.Random(pools.seed)
        self.step, self.tokens, self.seconds, self.next_pool = 0, 0, 0.0, 0
        self.losses: list[tuple[int, float, float]] = []
        """Step, seconds and loss, once every ``LOG_STEPS`` steps."""

    def run(
        self,
        length: float,
        unit: Literal["steps", "seconds"] = "steps",
        *,
        workers: int = 0,
        checkpoint: Path | None = None,
        checkpoint_s: float = 60.0,
    ) -> None:
        """Train until the cycle is ``length`` long: seconds where it is not known what a machine manages in them.

        ``workers`` processes make the batches. From ``checkpoint`` the cycle goes on where that file exists, and it is
        written when a pool is used up and ``checkpoint_s`` seconds have passed.
        """
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        kept = time.monotonic()
        begun = kept - self.seconds
        for pool in self.pools.after(self.next_pool, workers):
            self.random.shuffle(pool)
            for batch in pool:
                self.seconds = time.monotonic() - begun
                done = self.step if unit == "steps" else self.seconds
                if done >= length:
                    return
                loss = self._train(batch, min(1.0, (self.step + 1) / 50, (length - done) / (0.4 * length)))
                if self.step % LOG_STEPS == 0:
                    self.losses.append((self.step, self.seconds, loss.item()))
                    logger.info("step %d, %.0f s: loss %.4f", *self.losses[-1])
                self.step += 1
            self.next_pool += 1
            if checkpoint is not None and time.monotonic() - kept >= checkpoint_s:
                self.seconds = time.monotonic() - begun
                self._keep(checkpoint)
                kept = time.monotonic()

    def _train(self, batch: Batch, part: float) -> torch.Tensor:
        """Make one step at this part of the full rates; give its loss."""
        ids, labels = (torch.from_numpy(array).to(self.model.device) for array in batch)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * part
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += ids.numel()
        return loss

    def _keep(self, path: Path) -> None:
        whole = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
                "random": self.random.getstate(),
                "counts": (self.step, self.tokens, self.seconds, self.next_pool),
                "losses": self.losses,
            },
            whole,
        )
        write_whole(path, whole.getvalue())

    def _load(self, path: Path) -> None:
        kept = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(kept["model"])
        for (optimizer, _), state in zip(self.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.random.setstate(kept["random"])
        self.step, self.tokens, self.seconds, self.next_pool = kept["counts"]
        self.losses = kept["losses"]


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
        pools = Pools(tokenizer, int(seed), args.tokens_per_step)
        Cycle(model, pools, matrix_rate=float(matrix_rate), other_rate=float(other_rate)).run(int(steps))
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
