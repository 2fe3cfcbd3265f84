"""``python -m bench.generate``: who writes responses fastest, our batched loop or transformers' continuous batching.

The same prompts, greedy, in float32; both must write the same tokens. Needs a transformers whose ``generate_batch``
runs on the device.
"""

from __future__ import annotations

from transformers import GenerationConfig

from bench import tiny_inputs
from bench.measure import alternate, busy_clock, median, parser, ratio, report, use_threads
from jf_cluster.jacobi.responses import generate_responses


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--max-new-tokens", type=int, default=192)
    p.set_defaults(repeats=2)
    args = p.parse_args()
    use_threads(args.threads)
    model = tiny_inputs.load(args.model, args.device)
    prompts, end = tiny_inputs.prompts(args.model, args.prompts)
    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, eos_token_id=end, pad_token_id=end, do_sample=False, use_cuda_graph=False
    )

    def ours() -> list[list[int]]:
        written = generate_responses(model, prompts, max_new_tokens=args.max_new_tokens, end_ids=[end])
        return [r.tokens.tolist() for r in written]

    def theirs() -> list[list[int]]:
        written = model.generate_batch([row.tolist() for row in prompts], generation_config=config, warmup=False)
        return [written[name].generated_tokens for name in sorted(written, key=lambda n: int(n.rsplit("_", 1)[-1]))]

    same = sum(a == b for a, b in zip(ours(), theirs(), strict=True))
    seconds = alternate({"ours": ours, "theirs": theirs}, args.repeats, args.device, busy_clock(args.device))
    tokens = sum(map(len, ours()))
    figures = {
        "ratio_tokens_per_s_vs_continuous_batching": ratio(seconds["theirs"], seconds["ours"]),
        "same_responses": f"{same} of {len(prompts)}",
        "median_tokens_per_s_ours": tokens / median(seconds["ours"]),
        "median_tokens_per_s_continuous_batching": tokens / median(seconds["theirs"]),
        "response_tokens": tokens,
    }
    report("generation: our batched loop against transformers' continuous batching", figures, args.json)


if __name__ == "__main__":
    main()
