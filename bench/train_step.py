"""``python -m bench.train_step``: forward and backward of one training step, ours against the published layout.

Both sides train on the same samples, at the same positions, and must report the same loss. Measured at three lengths,
because a dense mask costs the more the longer a sample is: responses of 512 tokens, the tiny model's own of about a
hundred (``_short``), and of 1,536 tokens (``_long``).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from bench import published, tiny_inputs
from bench.measure import (
    Value,
    alternate,
    busy_clock,
    in_fresh_process,
    median,
    parser,
    peak_bytes,
    ratio,
    report,
    use_threads,
)
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate, pack
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.samples import Noise, Sample, build_sample
from jf_cluster.jacobi.trajectories import trace
from trajectory_store import Trajectory


class Sides:
    """Both sides over the same samples: forward and backward of all of them, gradients accumulated."""

    def __init__(self, args: argparse.Namespace, samples: list[Sample]) -> None:
        self.args, device = args, torch.device(args.device)
        self.model = tiny_inputs.load(args.model, args.device)
        bins = pack([s.length for s in samples], args.micro_batch_tokens)
        self.packed = [collate([samples[i] for i in members]).to(device) for members in bins]
        self.singles = [published.interleave(s, args.block_size, args.window, device) for s in samples]
        self.noisy = sum(b.noisy_tokens for b in self.packed)
        self.clean = sum(b.clean_tokens for b in self.packed)

    def ours(self) -> float:
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        with branch_attention(self.model, self.args.attention):
            for batch in self.packed:
                sums = forcing_loss(self.model, batch)
                loss = sums.consistency_sum / self.noisy + self.args.ar_weight * sums.ar_sum / self.clean
                loss.backward()
                total += loss.item()
        return total

    def theirs(self) -> float:
        self.model.zero_grad(set_to_none=True)
        return published.training_loss(self.model, self.singles, self.args.ar_weight)


def peak_of(side: str, args: argparse.Namespace, samples: list[Sample]) -> int:
    use_threads(args.threads)
    sides = Sides(args, samples)
    return peak_bytes(getattr(sides, side), args.device)


def draw(args: argparse.Namespace, response_tokens: int, count: int) -> list[Sample]:
    """Samples of the model's own trajectories; ``response_tokens`` above 0: solutions joined to that length."""
    model = tiny_inputs.load(args.model, args.device)
    prompts, end = tiny_inputs.prompts(args.model, count)
    written = generate_responses(model, prompts, max_new_tokens=192, end_ids=[end])
    responses = [r.tokens for r in written]
    if response_tokens:
        joined = np.tile(np.concatenate(responses), 1 + response_tokens * len(prompts) // sum(map(len, responses)))
        responses = [joined[i * response_tokens : (i + 1) * response_tokens] for i in range(len(prompts))]
    traces = trace(model, prompts, responses, block_size=args.block_size, keys=range(len(prompts)))
    return [
        build_sample(
            Trajectory(str(i), p.astype(np.int32), r, False, t.iterations, t.accepted, t.tails),
            args.block_size,
            Noise(window=args.window),
            np.random.default_rng(i),
        )
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]


def measure(args: argparse.Namespace, response_tokens: int, count: int) -> dict[str, Value]:
    samples = draw(args, response_tokens, count)
    sides = Sides(args, samples)
    losses = sides.ours(), sides.theirs()
    seconds = alternate(
        {"ours": sides.ours, "published": sides.theirs}, args.repeats, args.device, busy_clock(args.device)
    )
    peaks = {side: in_fresh_process(peak_of, side, args, samples) for side in ("ours", "theirs")}
    taught = sides.noisy + sides.clean
    return {
        # The same samples, so the same taught tokens, in the time each side needs for them.
        "ratio_tokens_per_s_vs_published": ratio(seconds["published"], seconds["ours"]),
        "ratio_peak_memory_vs_published": peaks["ours"] / peaks["theirs"],
        "loss_ours": losses[0],
        "loss_published": losses[1],
        "median_taught_tokens_per_s_ours": taught / median(seconds["ours"]),
        "median_taught_tokens_per_s_published": taught / median(seconds["published"]),
        "peak_mib_ours": peaks["ours"] / 2**20,
        "peak_mib_published": peaks["theirs"] / 2**20,
        "mean_sample_tokens": sum(s.length for s in samples) / len(samples),
        "forward_tokens_ours": sum(b.total_tokens for b in sides.packed),
        "forward_tokens_published": sum(s.tokens.numel() for s in sides.singles),
        "micro_batches_ours": len(sides.packed),
        "taught_noisy": sides.noisy,
        "taught_clean": sides.clean,
    }


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--response-tokens", type=int, default=512, help="length of the responses of the first measurement")
    p.add_argument("--long-response-tokens", type=int, default=1536, help="of the last one; 0 leaves it out")
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--window", type=int, default=4)
    p.add_argument("--micro-batch-tokens", type=int, default=1024)
    p.add_argument("--attention", default="auto", help="ours: auto, dense, sdpa, flex or flash")
    p.add_argument("--ar-weight", type=float, default=10.0)
    p.set_defaults(repeats=3)
    args = p.parse_args()
    use_threads(args.threads)
    figures = measure(args, args.response_tokens, args.samples)
    figures |= {f"{key}_short": value for key, value in measure(args, 0, args.samples).items()}
    if args.long_response_tokens:
        count = max(1, args.samples * args.response_tokens // args.long_response_tokens)  # about as many tokens in all
        long = measure(args, args.long_response_tokens, count)
        figures |= {f"{key}_long": value for key, value in long.items()}
    report("training step: ours against the published layout", figures, args.json)


if __name__ == "__main__":
    main()
