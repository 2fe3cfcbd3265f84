"""``python -m bench.decode``: decoding one request at a time, every mode against AR and transformers' own decoders.

All sides take turns on every prompt. ``ratio_forward_overhead`` compares a forward of our loop with the bare model
call on as many tokens over as long a cache; ``ratio_conversion`` is speed-up over AR divided by tokens per forward.
Where the rest of the time goes: ``ratio_bare_draft_vs_bare_one`` is what a forward of a draft costs more than one of a
single token before any bookkeeping, so its inverse is the best conversion this machine allows. ``share_differing_*``
are the responses that differ from AR's in ``--low-dtype``, where rounding decides near ties; in float32 there are none
(``exact``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from bench import tiny_inputs
from bench.measure import parser, ratio, report, use_threads
from jf_cluster.jacobi.decoding import Generation, generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.sampling import IntArray

Decode = Callable[[list[int]], tuple[int, float]]
"""Decodes one prompt; gives the tokens it wrote after the first and the seconds they took."""


def ours(
    model: PreTrainedModel, drafting: Drafting, *, max_new_tokens: int, end: int, made: list[Generation]
) -> Decode:
    """Decoding with our loop; what it writes is added to ``made``."""

    def decode(prompt: list[int]) -> tuple[int, float]:
        (g,) = generate(model, [prompt], max_new_tokens=max_new_tokens, end_ids=[end], drafting=drafting)
        made.append(g)
        return len(g.tokens) - 1, g.seconds

    return decode


def tokens_per_s(sides: Mapping[str, Decode], prompts: Sequence[IntArray], repeats: int) -> dict[str, list[float]]:
    """Every side's speed on every prompt, on which they take turns; the first time through all is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for prompt in prompts:
            found = {name: decode(prompt.tolist()) for name, decode in sides.items()}
            if turn and all(tokens > 0 for tokens, _ in found.values()):
                for name, (tokens, seconds) in found.items():
                    rates[name].append(tokens / seconds)
    return rates


def tpf(made: Sequence[Generation]) -> float:
    """Tokens per forward over all of them together."""
    return sum(len(g.tokens) - 1 for g in made) / max(sum(g.forwards for g in made), 1)


@torch.inference_mode()
def bare_forward_s(model: PreTrainedModel, length: int, tokens: int, repeats: int = 20) -> float:
    """Median seconds of the model alone on ``tokens`` tokens over a cache of ``length``."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, length, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    draft = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        model(input_ids=draft, past_key_values=cache, use_cache=True).logits.argmax(-1).tolist()
        seconds.append(time.perf_counter() - begun)
        cache.crop(-tokens)
    return statistics.median(seconds)


def bandwidth_limit_s(model: PreTrainedModel) -> float:
    """Least seconds of a forward over one token: every weight read once at the speed the device copies memory."""
    source = torch.empty(2**28, dtype=torch.int32, device=model.device)
    target = torch.empty_like(source)

    def copy_s() -> float:
        begun = time.perf_counter()
        target.copy_(source)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    rate = 2 * source.nbytes / min(copy_s() for _ in range(10))
    read = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    return read / rate


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.trained(), help="a trained round's export; the base shows no gain")
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=192)
    p.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32])
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--pool", type=int, default=4)
    p.add_argument("--low-dtype", choices=["none", "bfloat16", "float16"], default="bfloat16")
    p.add_argument("--low-prompts", type=int, default=64, help="prompts decoded in it")
    p.set_defaults(repeats=3)
    args = p.parse_args()
    use_threads(args.threads)
    model = tiny_inputs.load(args.model, args.device)
    prompts, end = tiny_inputs.prompts(args.model, args.prompts)
    draftings = {"ar": AUTOREGRESSIVE}
    for n in args.block_sizes:
        draftings[f"jacobi_{n}"] = Drafting("jacobi", n)
        draftings[f"multiblock_{n}"] = Drafting("multiblock", n, blocks=args.blocks, pool=args.pool)
    made: dict[str, list[Generation]] = {name: [] for name in draftings}

    def theirs(**options: int) -> Decode:
        def decode(prompt: list[int]) -> tuple[int, float]:
            ids = torch.tensor([prompt], device=model.device)
            times: list[float] = []

            # The prefill is not counted on either side: the clock starts when the first new token is known.
            def first_token(*_: object) -> bool:
                if not times:
                    times.append(time.perf_counter())
                return False

            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                stopping_criteria=[lambda *a, **k: torch.tensor([first_token()], device=model.device)],
                **options,
            )
            return out.shape[1] - len(prompt) - 1, time.perf_counter() - times[0]

        return decode

    options = {"max_new_tokens": args.max_new_tokens, "end": end}
    sides = {name: ours(model, drafting, made=made[name], **options) for name, drafting in draftings.items()}
    sides |= {"hf_generate": theirs(), "hf_prompt_lookup": theirs(prompt_lookup_num_tokens=10)}
    rates = tokens_per_s(sides, prompts, args.repeats)
    tpfs = {name: tpf(generations) for name, generations in made.items()}

    def speed(name: str, against: str) -> float:
        return ratio(rates[name], rates[against])

    jacobi = [n for n in sides if n.startswith("jacobi")]
    multiblock = [n for n in sides if n.startswith("multiblock")]
    best = max([*jacobi, *multiblock], key=lambda name: speed(name, "ar"))
    n = int(best.rsplit("_", 1)[1])
    plain = f"jacobi_{n}"
    length = statistics.median(len(p) for p in prompts) + statistics.median(len(g.tokens) for g in made["ar"]) / 2
    forward = statistics.median(g.seconds / g.forwards for g in made[plain] if g.forwards)
    bare = bare_forward_s(model, int(length), n)
    figures: dict[str, float | int | str] = {
        "ratio_speedup_vs_ar": speed(best, "ar"),
        "ratio_conversion": speed(best, "ar") / tpfs[best],
        "ratio_forward_overhead": forward / bare,
        "ratio_bare_draft_vs_bare_one": bare / bare_forward_s(model, int(length), 1),
        "ratio_multiblock_tpf_vs_jacobi": max(tpfs[m] / tpfs[m.replace("multiblock", "jacobi")] for m in multiblock),
        "ratio_tps_vs_hf_generate": speed(best, "hf_generate"),
        "ratio_tps_vs_hf_prompt_lookup": speed(best, "hf_prompt_lookup"),
        "ratio_ar_vs_hf_generate": speed("ar", "hf_generate"),
        "model": Path(args.model).name,
        "best": best,
        "exact": str(all([g.tokens for g in made[m]] == [g.tokens for g in made["ar"]] for m in made)),
    }
    if args.device == "cuda":
        one = statistics.median(g.seconds / g.forwards for g in made["ar"] if g.forwards)
        figures["share_ar_of_bandwidth_limit"] = bandwidth_limit_s(model) / one
    for name in sides:
        figures[f"speedup_{name}"] = speed(name, "ar")
        if name in made:
            figures[f"tpf_{name}"] = tpfs[name]
            figures[f"conversion_{name}"] = speed(name, "ar") / tpfs[name]
    if args.low_dtype != "none" and args.model not in tiny_inputs.SHAPES:
        model.to(getattr(torch, args.low_dtype))
        batch = [prompt.tolist() for prompt in tiny_inputs.prompts(args.model, args.low_prompts)[0]]
        together = {"max_new_tokens": args.max_new_tokens, "end_ids": [end]}
        low = [g.tokens for g in generate(model, batch, drafting=AUTOREGRESSIVE, **together)]
        for mode in ("jacobi", "multiblock"):
            other = generate(model, batch, drafting=Drafting(mode, n, pool=args.pool), **together)  # type: ignore[arg-type]
            differing = sum(g.tokens != tokens for g, tokens in zip(other, low, strict=True))
            figures[f"share_differing_{args.low_dtype}_{mode}"] = differing / len(low)
    figures["median_tokens_per_s_ar"] = statistics.median(rates["ar"])
    report("decode: one request at a time, all sides in turn", figures, args.json)


if __name__ == "__main__":
    main()
