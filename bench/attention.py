"""``python -m bench.attention``: the attention backends against the dense oracle, forward and backward, one layer.

Samples as training lays them out, ``--shapes`` gives tokens x samples: prompt and response of so many tokens, and noisy
branches of ``window`` blocks of n tokens (window 0: the whole response is one branch). ``difference_*`` is the largest
deviation of outputs and gradients from the oracle's, over the oracle's largest value. Beyond ``--dense-up-to`` tokens
the oracle is left out, as its mask is quadratic, and the ratios are against the first backend measured.
"""

from __future__ import annotations

import importlib.util
import itertools

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.measure import Value, alternate, busy_clock, parser, peak_bytes, ratio, report, use_threads
from jf_cluster.jacobi.attention import Backend, implementation
from jf_cluster.jacobi.layout import Branch, Forest


def forest(tokens: int, samples: int, block_size: int, window: int, device: str) -> Forest:
    """Prompts of an eighth of the tokens, responses of the rest, and a branch of ``window`` blocks at every window."""
    prompt, response = tokens // 8, tokens - tokens // 8
    span = window * block_size or response
    starts = range(0, response, span)
    branches = tuple(Branch(i, prompt + at, min(span, response - at)) for i in range(samples) for at in starts)
    return Forest((tokens,) * samples, branches, torch.device(device))


class Side:
    """One backend on one layout; ``run`` is a forward and a backward pass."""

    def __init__(self, backend: Backend, layout: Forest, inputs: list[torch.Tensor]) -> None:
        self.attend, self.layout, self.inputs = ALL_ATTENTION_FUNCTIONS[implementation(backend)], layout, inputs

    def run(self) -> list[torch.Tensor]:
        """The output [1, T, H, D] and the gradients of queries, keys and values."""
        query, key, value = (x.detach().requires_grad_() for x in self.inputs)
        out, _ = self.attend(None, query, key, value, None, layout=self.layout)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def measure(backends: list[Backend], layout: Forest, inputs: list[torch.Tensor], repeats: int) -> dict[str, Value]:
    device = inputs[0].device.type
    sides = {name: Side(name, layout, inputs) for name in backends}
    first, *others = backends
    expected = sides[first].run()
    figures: dict[str, Value] = {f"difference_{b}": difference(sides[b].run(), expected) for b in others}
    seconds = alternate({name: side.run for name, side in sides.items()}, repeats, device, busy_clock(device))
    peaks = {name: peak_bytes(side.run, device) for name, side in sides.items()} if device == "cuda" else {}
    for name in others:
        figures[f"ratio_time_{name}_vs_{first}"] = ratio(seconds[name], seconds[first])
        if peaks:  # on a CPU a process's resident set says little about one call
            figures[f"ratio_memory_{name}_vs_{first}"] = peaks[name] / peaks[first]
    for name in backends:
        figures[f"ms_{name}"] = 1e3 * sorted(seconds[name])[len(seconds[name]) // 2]
    return figures


def available(device: str) -> list[Backend]:
    """Backends that run here with gradients; FlexAttention has none on a CPU."""
    if device != "cuda":
        return ["dense", "sdpa"]
    return ["dense", "sdpa", "flex", *(["flash"] if importlib.util.find_spec("flash_attn") else [])]  # type: ignore[list-item]


def main() -> None:
    p = parser(__doc__ or "")
    gpu = torch.cuda.is_available()
    p.add_argument("--shapes", nargs="+", default=["4096x1", "16384x1"] if gpu else ["2048x1", "200x12"])
    p.add_argument("--block-sizes", type=int, nargs="+", default=[16, 64] if gpu else [16])
    p.add_argument("--windows", type=int, nargs="+", default=[1, 16, 0] if gpu else [1, 4, 0])
    p.add_argument("--heads", type=int, default=28 if gpu else 6)
    p.add_argument("--key-value-heads", type=int, default=4 if gpu else 2)
    p.add_argument("--head-size", type=int, default=128 if gpu else 32)
    p.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    p.add_argument("--dense-up-to", type=int, default=8192)
    args = p.parse_args()
    use_threads(args.threads)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    figures: dict[str, Value] = {}
    for shape in args.shapes:
        tokens, samples = map(int, shape.split("x"))
        for block_size, window in itertools.product(args.block_sizes, args.windows):
            layout = forest(tokens, samples, block_size, window, args.device)
            inputs = [
                torch.randn(1, heads, layout.total_tokens, args.head_size, generator=generator).to(args.device, dtype)
                for heads in (args.heads, args.key_value_heads, args.key_value_heads)
            ]
            backends = [b for b in available(args.device) if b != "dense" or tokens * samples <= args.dense_up_to]
            found = measure(backends, layout, inputs, args.repeats)
            figures |= {f"{key}_{shape}_n{block_size}_w{window}": value for key, value in found.items()}
    report("attention: backends against the dense oracle", figures, args.json)


if __name__ == "__main__":
    main()
