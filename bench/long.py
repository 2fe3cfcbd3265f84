"""``python -m bench.long``: does a token cost more because many were written before it, beyond what attention costs?

One response of ``--tokens`` tokens, end tokens ignored. Each decode step is timed whole and in two parts: the model's
forward (attention over a longer cache is in it) and everything else, the bookkeeping. Compared are the first and the
last tenth of the steps; ``ratio_bookkeeping_growth`` near 1 means that nothing is done over and over for what was
written before.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import tiny_inputs
from bench.measure import parser, report, use_threads
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.drafts import Drafting, Row
from jf_cluster.jacobi.engine import Batch
from jf_cluster.jacobi.text import TextStream


def steps(model: PreTrainedModel, prompt: list[int], drafting: Drafting, tokens: int) -> list[tuple[float, float]]:
    """Seconds of every decode step: the whole, and the model's forward in it."""
    inside: list[float] = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        out = forward(*args, **kwargs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        inside.append(time.perf_counter() - begun)
        return out

    taken = []
    model.forward = timed
    try:
        with branch_attention(model), torch.inference_mode():
            batch = Batch(model, rows=1, slots=len(prompt) + tokens, widest=drafting.longest)
            # A stop string that never comes: reading the text must not cost more either.
            text = TextStream(lambda ids: " ".join(map(str, ids)) + " ", ["never"])
            batch.join([Row(prompt, 0, drafting, tokens, frozenset(), text=text)])
            while batch.active:
                begun, before = time.perf_counter(), len(inside)
                batch.step()
                taken.append((time.perf_counter() - begun, sum(inside[before:])))
    finally:
        model.forward = forward
    return taken


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--block-size", type=int, default=16)
    args = p.parse_args()
    use_threads(args.threads)
    config = AutoConfig.from_pretrained(args.model)
    config.max_position_embeddings = max(config.max_position_embeddings, args.tokens + 512)
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32).eval().to(args.device)
    prompts, _ = tiny_inputs.prompts(args.model, 1)
    figures: dict[str, float | int | str] = {"tokens": args.tokens}
    for mode in ("ar", "jacobi", "multiblock"):
        taken = steps(model, prompts[0].tolist(), Drafting(mode, args.block_size), args.tokens)  # type: ignore[arg-type]
        tenth = max(1, len(taken) // 10)
        parts = {"first": taken[:tenth], "last": taken[-tenth:]}
        whole = {name: statistics.median(w for w, _ in part) for name, part in parts.items()}
        forward = {name: statistics.median(f for _, f in part) for name, part in parts.items()}
        other = {name: statistics.median(w - f for w, f in part) for name, part in parts.items()}
        figures |= {
            f"ratio_bookkeeping_growth_{mode}": other["last"] / other["first"],
            f"ratio_step_growth_{mode}": whole["last"] / whole["first"],
            f"ratio_forward_growth_{mode}": forward["last"] / forward["first"],
            f"share_bookkeeping_{mode}": other["last"] / whole["last"],
            f"us_bookkeeping_first_{mode}": 1e6 * other["first"],
            f"us_bookkeeping_last_{mode}": 1e6 * other["last"],
            f"ms_step_last_{mode}": 1e3 * whole["last"],
        }
    report(f"long: a response of {args.tokens} tokens", figures, args.json)


if __name__ == "__main__":
    main()
