"""``python -m bench.end_to_end --output DIR``: random weights to a faster decoder on one GPU, in about 20 minutes.

A model of about 100 million parameters is pretrained for ``--minutes`` on problems harder than the embedded ones, then
goes through rounds of Jacobi Forcing (two unless ``--block-sizes`` says otherwise, each at half the learning rate of
the one before). The base and every round's model decode held-out problems: all of them together for the accuracy, and
some one at a time, AR, Jacobi and multi-block decoding in turn on the same engine, for TPF, TPS and speed-up
(medians of the ratios). In float32 all three write the same tokens; in bfloat16 rounding decides near ties, and
``share_differing_…`` are the responses that are not AR's.

What a stage makes appears whole in DIR, and a stage whose result is there is skipped: the same command goes on where
the last one was cut, pretraining at its last checkpoint, every other stage at its beginning. Curves are in
``DIR/curves.json``. Needs torch, transformers and pyarrow only. It is no part of ``bench.gpu``'s list.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench import ablation, tiny_inputs
from bench.ablate import open_directory, write_json
from bench.decode import ours, tokens_per_s, tpf
from bench.measure import Value, add_flags, from_flags, median, parser, ratio, report, use_threads
from jf_cluster.jacobi.attention import Backend
from jf_cluster.jacobi.decoding import Generation
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.tiny.pretrain import Cycle, Pools, build_model
from jf_cluster.tiny.problems import HARD, Difficulty, problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretraining:
    """The base model, and how it comes to be; the defaults are for one H100 or H200."""

    width: int = 768
    inner_width: int = 3072
    layers: int = 12
    heads: int = 12
    key_value_heads: int = 4
    minutes: float = 10.0
    pretraining_steps: int = 0
    """Instead of minutes, where not 0."""
    pretraining_tokens: int = 32768
    """Tokens of a step, padding included."""
    matrix_rate: float = 0.015
    other_rate: float = 2e-3

    def __post_init__(self) -> None:
        amounts = [amount for name, amount in asdict(self).items() if name != "pretraining_steps"]
        if min(amounts) <= 0 or self.pretraining_steps < 0:
            raise ValueError(f"{self}: all but the steps must be above 0")
        if self.width % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError(f"{self}: the width must be an even multiple of the heads, these of the key-value heads")


ROUNDS = ablation.Recipe(block_sizes=(16, 32))
EFFORT = ablation.Effort(
    prompts=8192, steps=300, step_tokens=32768, learning_rate=5e-4, held_out=1000, max_new_tokens=320, decoding_block=32
)
"""Rates and amounts are guesses from the embedded model's: nothing of it was run on a GPU so far."""


@dataclass(frozen=True)
class Conduct:
    """How the stages are run, which changes nothing in what is trained."""

    workers: int = 2
    """Processes that make the pretraining batches: one makes half a million tokens a second, about what a GPU takes."""
    checkpoint_s: float = 60.0
    """Seconds between checkpoints of the pretraining."""
    backend: Backend = "auto"
    """The attention of the rounds' training."""
    speed_prompts: int = 16
    """Held-out problems decoded one at a time."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.speed_prompts < 1:
            raise ValueError(f"{self}: workers must be at least 0, problems at least 1")


SIDES = {"ar": AUTOREGRESSIVE, "jacobi": Drafting("jacobi"), "multiblock": Drafting("multiblock")}
OURS = ("jacobi", "multiblock")


@dataclass(frozen=True)
class Run:
    """Everything the stages need to know."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    device: str
    dtype: torch.dtype
    """What models decode in and, as autocast, are trained in."""
    repeats: int
    pretraining: Pretraining
    difficulty: Difficulty
    recipe: ablation.Recipe
    effort: ablation.Effort
    conduct: Conduct

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def model_of(self, number: int) -> Path:
        """The model after a round; round 0's is the base."""
        return self.folder / f"round-{number:03d}"

    def measured(self, number: int) -> Path:
        return self.folder / f"round-{number:03d}.json"

    def load(self, number: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return tiny_inputs.load(self.model_of(number), self.device, dtype or self.dtype)

    def publish(self, model: PreTrainedModel, number: int, curve: dict[str, Any]) -> None:
        """The model appears whole, in float32, with what its training looked like."""
        target = self.model_of(number)
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        write_json(partial / "training.json", curve)
        partial.rename(target)


def pretrain(run: Run) -> None:
    """The base, with next-token loss on worked solutions."""
    p = run.pretraining
    model = build_model(
        len(run.tokenizer), p.width, p.layers,
        intermediate_size=p.inner_width, heads=p.heads, key_value_heads=p.key_value_heads,
    ).to(run.device)  # fmt: skip
    pools = Pools(run.tokenizer, 0, p.pretraining_tokens, run.difficulty, rest=True)
    cycle = Cycle(model, pools, matrix_rate=p.matrix_rate, other_rate=p.other_rate, bf16=run.bf16)
    checkpoint = run.folder / "pretraining.pt"
    cycle.run(
        p.pretraining_steps or p.minutes * 60,
        "steps" if p.pretraining_steps else "seconds",
        workers=run.conduct.workers,
        checkpoint=checkpoint,
        checkpoint_s=run.conduct.checkpoint_s,
    )
    steps, seconds, losses = zip(*cycle.losses, strict=True)
    made = {
        "parameters": model.num_parameters(),
        "steps": cycle.step,
        "tokens": cycle.tokens,
        "seconds": cycle.seconds,
        "curve": {"step": steps, "seconds": seconds, "loss": losses},
    }
    run.publish(model, 0, made)
    checkpoint.unlink(missing_ok=True)


def force(run: Run, number: int) -> None:
    """One round of Jacobi Forcing on the model of the one before."""
    recipe, block_size = run.recipe, run.recipe.block_sizes[number - 1]
    effort = replace(run.effort, learning_rate=run.effort.learning_rate / 2 ** (number - 1))
    begun = time.perf_counter()
    base, newest = run.load(0), run.load(number - 1)
    tracer = base if recipe.trajectories == "reused" else newest
    forward_tokens = 65536 if run.device == "cuda" else 2048
    rows = ablation.collect(
        base, newest, tracer, run.tokenizer, number, recipe, effort, 0,
        difficulty=run.difficulty, forward_tokens=forward_tokens,
    )  # fmt: skip
    del base, newest, tracer
    collected = time.perf_counter()
    logger.info("round %d: trajectories of %d prompts collected in %.0f s", number, len(rows), collected - begun)
    model = run.load(number - 1, torch.float32)
    losses = ablation.train(model, rows, block_size, recipe, effort, number, bf16=run.bf16, backend=run.conduct.backend)
    made = {
        "response_tokens": sum(len(r.response) for r in rows),
        "iterations_per_block": float(np.concatenate([r.iterations for r in rows]).mean()),
        "seconds_collecting": collected - begun,
        "seconds_training": time.perf_counter() - collected,
        "curve": {"consistency": [loss.consistency for loss in losses], "ar": [loss.ar for loss in losses]},
    }
    run.publish(model, number, made)


def evaluate(run: Run, number: int) -> None:
    """Accuracy, TPF and TPS of a round's model."""
    model = run.load(number)
    _, accuracy = ablation.evaluate(model, run.tokenizer, run.effort, run.difficulty)
    made: dict[str, list[Generation]] = {side: [] for side in SIDES}
    options = {"max_new_tokens": run.effort.max_new_tokens, "end": run.tokenizer.eos_token_id}
    sides = {
        side: ours(model, replace(drafting, block_size=run.effort.decoding_block), made=made[side], **options)
        for side, drafting in SIDES.items()
    }
    chosen = [problem("heldout", 0, index, run.difficulty) for index in range(run.conduct.speed_prompts)]
    rates = tokens_per_s(sides, [tiny_inputs.encode(run.tokenizer, p) for p in chosen], run.repeats)
    accelerator = torch.cuda.get_device_name() if run.device == "cuda" else "none"
    found: dict[str, Value] = {"accuracy": accuracy, "accelerator": accelerator}
    for side in SIDES:
        found[f"tpf_{side}"] = tpf(made[side])
        found[f"median_tokens_per_s_{side}"] = median(rates[side])
    for side in OURS:
        found[f"ratio_speedup_{side}_vs_ar"] = ratio(rates[side], rates["ar"])
        differing = [g.tokens != ar.tokens for g, ar in zip(made[side], made["ar"], strict=True)]
        found[f"share_differing_{side}"] = sum(differing) / len(differing)
    write_json(run.measured(number), found)


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    """The rounds as Markdown, the base as round 0."""
    columns = {"accuracy": ("accuracy", ".1%")}
    columns |= {f"TPF {side}": (f"tpf_{side}", ".2f") for side in OURS}
    columns |= {f"TPS {side}": (f"median_tokens_per_s_{side}", ".0f") for side in SIDES}
    columns |= {f"speed-up {side}": (f"ratio_speedup_{side}_vs_ar", ".2f") for side in OURS}
    columns |= {f"differing {side}": (f"share_differing_{side}", ".1%") for side in OURS}
    columns |= {"accelerator": ("accelerator", "")}
    rows = [["round", *columns], ["---"] * (1 + len(columns))]
    rows += [[str(n), *(format(m[key], shape) for key, shape in columns.values())] for n, m in enumerate(measured)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figures(run: Run, measured: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    """All but the curves, flat."""
    first, last = measured[0], measured[-1]
    found: dict[str, Value] = {
        "ratio_speedup_vs_ar": max(last[f"ratio_speedup_{side}_vs_ar"] for side in OURS),
        "accuracy_lost": first["accuracy"] - last["accuracy"],
        "tokens_per_s_pretraining": trained[0]["tokens"] / trained[0]["seconds"],
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    for number, both in enumerate(zip(measured, trained, strict=True)):
        for part in both:
            found |= {f"{key}_round_{number}": value for key, value in part.items() if key != "curve"}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__ or "")
    p.set_defaults(repeats=2)
    p.add_argument("--output", type=Path, required=True, help="directory of all that is made")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="of decoding; on a GPU bfloat16 by default")
    defaults = (Pretraining(), HARD, ROUNDS, EFFORT, Conduct())
    for part in defaults:
        add_flags(p, part)
    args = p.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    use_threads(args.threads)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    try:
        *trained_by, conduct = (from_flags(args, part) for part in defaults)
        settings = {key: value for part in trained_by for key, value in asdict(part).items()}
        folder = open_directory(args.output, {**settings, "device": args.device, "dtype": dtype})
    except ValueError as error:
        p.error(str(error))
    tokenizer = AutoTokenizer.from_pretrained(tiny_inputs.TINY)
    run = Run(folder, tokenizer, args.device, getattr(torch, dtype), args.repeats, *trained_by, conduct)
    rounds = range(1 + len(run.recipe.block_sizes))
    for number in rounds:
        make = partial(force, run, number) if number else partial(pretrain, run)
        for result, stage in ((run.model_of(number), make), (run.measured(number), partial(evaluate, run, number))):
            if not result.exists():
                begun = time.perf_counter()
                stage()
                logger.info("%s: made in %.0f s", result.name, time.perf_counter() - begun)
    measured = [json.loads(run.measured(number).read_text()) for number in rounds]
    trained = [json.loads((run.model_of(number) / "training.json").read_text()) for number in rounds]
    by_round = {key: [m[key] for m in measured] for key in ("accuracy", *(f"tpf_{side}" for side in OURS))}
    write_json(folder / "curves.json", {"training": [t["curve"] for t in trained], "by_round": by_round})
    print(table(measured))
    report("end_to_end: pretraining, rounds of Jacobi Forcing, decoding", figures(run, measured, trained), args.json)


if __name__ == "__main__":
    main()
