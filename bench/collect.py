"""``python -m bench.collect``: collecting trajectories, ours against the published procedure, on the same prompts.

Ours writes all responses in one batch and then iterates all blocks of all of them at the same time.
"""

from __future__ import annotations

from bench import published, tiny_inputs
from bench.measure import alternate, busy_clock, median, parser, ratio, report, use_threads
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.trajectories import trace


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--published-prompts", type=int, default=8, help="the published side handles this many of them")
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=192)
    p.add_argument("--forward-tokens", type=int, default=2048, help="most tokens of one forward while iterating")
    p.set_defaults(repeats=3)
    args = p.parse_args()
    use_threads(args.threads)
    model = tiny_inputs.load(args.model, args.device)
    prompts, end = tiny_inputs.prompts(args.model, args.prompts)
    keys = range(len(prompts))
    responses = generate_responses(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end])

    options = {"block_size": args.block_size, "keys": keys, "forward_tokens": args.forward_tokens}
    traces = trace(model, prompts, [r.tokens for r in responses], **options)
    response_tokens = sum(len(r.tokens) for r in responses)

    def ours_generation() -> None:
        generate_responses(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end])

    def ours_trajectories() -> None:
        trace(model, prompts, [r.tokens for r in responses], **options)

    def theirs() -> list[list[int]]:
        return [
            published.collect(
                model, prompt, block_size=args.block_size, max_new_tokens=args.max_new_tokens, end_id=end, key=key
            )[0]
            for key, prompt in list(enumerate(prompts))[: args.published_prompts]
        ]

    same = sum(a == b.tokens.tolist()[: len(a)] for a, b in zip(theirs(), responses, strict=False))
    seconds = alternate(
        {"generation": ours_generation, "trajectories": ours_trajectories, "published": theirs},
        args.repeats,
        args.device,
        busy_clock(args.device),
    )
    ours_rate = [args.prompts / (g + t) for g, t in zip(seconds["generation"], seconds["trajectories"], strict=True)]
    their_rate = [args.published_prompts / s for s in seconds["published"]]
    figures = {
        "ratio_collect_vs_published": ratio(ours_rate, their_rate),
        "ratio_trajectories_vs_generation": ratio(seconds["trajectories"], seconds["generation"]),
        "same_responses": f"{same} of {args.published_prompts}",
        "median_trajectories_per_s_ours": median(ours_rate),
        "median_trajectories_per_s_published": median(their_rate),
        "response_tokens": response_tokens,
        # What the model has to forward for the trajectories: about n / 2 where it is far from decoding in parallel.
        "noisy_tokens_per_response_token": sum(len(t.tails) for t in traces) / response_tokens,
        "median_s_generation": median(seconds["generation"]),
        "median_s_trajectories": median(seconds["trajectories"]),
        "block_size": args.block_size,
    }
    report("collect: ours against the published procedure", figures, args.json)


if __name__ == "__main__":
    main()
