"""``python -m bench.train_step``: forward and backward of one training step, ours against the published layout.

Both sides train on the same samples and must report the same loss.
"""

from __future__ import annotations

import numpy as np
import torch

from bench import published, tiny_inputs
from bench.measure import alternate, median, parser, ratio, report
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.samples import Noise, build_sample
from jf_cluster.jacobi.trajectories import trace
from trajectory_store import Trajectory


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=str(tiny_inputs.TINY))
    p.add_argument("--samples", type=int, default=16)
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--window", type=int, default=4)
    p.add_argument("--draws", type=int, default=1)
    p.add_argument("--ar-weight", type=float, default=10.0)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = tiny_inputs.load(args.model, args.device)
    prompts, end = tiny_inputs.prompts(args.model, args.samples)
    responses = generate_responses(model, prompts, max_new_tokens=192, end_ids=[end])
    traces = trace(model, prompts, [r.tokens for r in responses], block_size=args.block_size, keys=range(len(prompts)))
    noise = Noise(window=args.window, draws=args.draws)
    samples = [
        build_sample(
            Trajectory(str(i), p.astype(np.int32), r.tokens, r.finished, t.iterations, t.accepted, t.tails),
            args.block_size,
            noise,
            np.random.default_rng(i),
        )
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]
    packed, singles = collate(samples).to(device), [collate([s]).to(device) for s in samples]

    def ours() -> float:
        model.zero_grad(set_to_none=True)
        with branch_attention(model):
            loss = forcing_loss(model, packed).total(args.ar_weight)
            loss.backward()
        return loss.item()

    def theirs() -> float:
        model.zero_grad(set_to_none=True)
        with branch_attention(model, "dense"):
            return published.training_loss(model, singles, args.ar_weight)

    losses = ours(), theirs()
    seconds = alternate({"ours": ours, "published": theirs}, args.repeats, args.device)
    figures = {
        "ratio_tokens_per_s_vs_published": ratio(seconds["published"], seconds["ours"]),
        "loss_ours": losses[0],
        "loss_published": losses[1],
        "median_tokens_per_s_ours": packed.total_tokens / median(seconds["ours"]),
        "median_tokens_per_s_published": packed.total_tokens / median(seconds["published"]),
        "tokens": packed.total_tokens,
        "noisy_positions": packed.noisy_tokens,
        "clean_positions": packed.clean_tokens,
    }
    report("training step: ours against the published layout", figures, args.json)


if __name__ == "__main__":
    main()
