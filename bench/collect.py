"""``python -m bench.collect``: collecting trajectories, ours against the published procedure, on the same prompts.

Ours (``one_pass``) writes the responses and their trajectories in the same forwards, as a round does where the newest
model writes. Where another model has written, all blocks of all responses iterate at the same time (``trajectories``);
``two_stages`` is that after the batched AR generation (``generation``). What the trajectories cost is what they add to
the generation alone: ``ratio_trajectories_vs_generation``.

Both sides compute in the type the tiny model's weights are stored in, bfloat16, where the processor multiplies it in
hardware, and again in float32 (``_float32``), where all of them must find the same trajectories.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from bench import published, tiny_inputs
from bench.measure import Value, alternate, busy_clock, median, parser, ratio, report, use_threads
from jf_cluster.jacobi.one_pass import respond_and_trace
from jf_cluster.jacobi.responses import Response, generate_responses
from jf_cluster.jacobi.traces import Trace
from jf_cluster.jacobi.trajectories import trace


def dtypes(device: str) -> list[str]:
    """Types to measure in; the first one's figures have the plain names."""
    if device == "cuda":
        return ["bfloat16"]
    fast = torch.cpu.get_capabilities().get("amx_bf16", False)
    return ["bfloat16", "float32"] if fast else ["float32"]


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Value]:
    model = tiny_inputs.load(args.model, args.device, getattr(torch, dtype))
    prompts, end = tiny_inputs.prompts(args.model, args.prompts)
    keys = range(len(prompts))
    responses = generate_responses(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end])

    options = {"block_size": args.block_size, "keys": keys, "forward_tokens": args.forward_tokens}
    traces = trace(model, prompts, [r.tokens for r in responses], **options)
    response_tokens = sum(len(r.tokens) for r in responses)

    def ours() -> list[tuple[Response, Trace]]:
        return respond_and_trace(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end], **options)

    def generation() -> None:
        generate_responses(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end])

    def trajectories() -> None:
        trace(model, prompts, [r.tokens for r in responses], **options)

    def theirs() -> list[list[int]]:
        return [
            published.collect(
                model, prompt, block_size=args.block_size, max_new_tokens=args.max_new_tokens, end_id=end, key=key
            )[0]
            for key, prompt in list(enumerate(prompts))[: args.published_prompts]
        ]

    same = sum(a == b.tokens.tolist()[: len(a)] for a, b in zip(theirs(), responses, strict=False))
    alike = sum(
        np.array_equal(a.tokens, r.tokens)
        and np.array_equal(b.accepted, t.accepted)
        and np.array_equal(b.tails, t.tails)
        for (a, b), r, t in zip(ours(), responses, traces, strict=True)
    )
    seconds = alternate(
        {"one_pass": ours, "generation": generation, "trajectories": trajectories, "published": theirs},
        args.repeats,
        args.device,
        busy_clock(args.device),
    )
    one, alone = seconds["one_pass"], seconds["generation"]
    staged = [g + t for g, t in zip(alone, seconds["trajectories"], strict=True)]
    their_s = [s * args.prompts / args.published_prompts for s in seconds["published"]]
    return {
        "ratio_collect_vs_published": ratio(their_s, one),
        "ratio_trajectories_vs_generation": ratio([o - g for o, g in zip(one, alone, strict=True)], alone),
        "ratio_two_stages_vs_published": ratio(their_s, staged),
        "ratio_two_stages_trajectories_vs_generation": ratio(seconds["trajectories"], alone),
        "ratio_one_pass_vs_two_stages": ratio(one, staged),
        "same_responses": f"{same} of {args.published_prompts}",
        "one_pass_same_as_two_stages": f"{alike} of {args.prompts}",
        "median_trajectories_per_s_ours": args.prompts / median(one),
        "median_trajectories_per_s_published": args.prompts / median(their_s),
        "response_tokens": response_tokens,
        # What the model has to forward for the trajectories: about n / 2 where it is far from decoding in parallel.
        "noisy_tokens_per_response_token": sum(len(t.tails) for t in traces) / response_tokens,
        "median_s_one_pass": median(one),
        "median_s_generation": median(alone),
        "median_s_trajectories": median(seconds["trajectories"]),
        "block_size": args.block_size,
        "dtype": dtype,
    }


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--published-prompts", type=int, default=8, help="the published side handles this many of them")
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=192)
    p.add_argument("--forward-tokens", type=int, default=2048, help="most tokens of one forward while iterating")
    p.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], help="default: what this processor is fast at"
    )
    p.set_defaults(repeats=3)
    args = p.parse_args()
    use_threads(args.threads)
    first, *others = args.dtypes or dtypes(args.device)
    figures = measure(args, first)
    for dtype in others:
        figures |= {f"{key}_{dtype}": value for key, value in measure(args, dtype).items()}
    report("collect: ours against the published procedure", figures, args.json)


if __name__ == "__main__":
    main()
