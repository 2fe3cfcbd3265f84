"""``python -m bench.roofline``: how near to what the machine can do: forwards, trajectories and training steps.

The limit of a piece of work is the larger of two times: its bytes (weights read once a forward, keys and values of the
context) at the rate the device copies memory, and its floating-point operations at the rate of a large matrix product
in the model's type, both measured first. ``share_…`` is limit over measured time; ``bound_…`` says which of the two
times is the limit. For a training step ``mfu_…`` is the model FLOP utilisation: three times the forward's operations
(no recomputation counted), of tokens that are not padding, at the rate measured and, where the GPU is known, at its
maker's. What is missing to 1 is attention's softmax, norms, rotary embeddings, copies, small matrices that do not fill
the device, and launches from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from bench import tiny_inputs
from bench.measure import Value, busy_clock, parser, report, use_threads
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate, pack
from jf_cluster.jacobi.samples import Noise, build_sample
from jf_cluster.jacobi.trajectories import trace
from trajectory_store import Trajectory

MAKERS_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second by the maker's data sheet."""


@dataclass(frozen=True)
class Work:
    """What a piece of work has to do at least."""

    operations: float
    bytes: float

    def limit_s(self, operations_per_s: float, bytes_per_s: float) -> float:
        return max(self.operations / operations_per_s, self.bytes / bytes_per_s)

    def bound(self, operations_per_s: float, bytes_per_s: float) -> str:
        return "operations" if self.operations / operations_per_s > self.bytes / bytes_per_s else "bytes"


def forward(model: PreTrainedModel, tokens: int, seen: int, chosen: int, passes: int = 1) -> Work:
    """Forwards of ``tokens`` tokens in all that attend to ``seen`` slots in all and give ``chosen`` rows of logits.

    Two operations a weight and token (the head's only for rows that are chosen from), four an attended slot, head and
    head dimension in each layer.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    head = config.hidden_size * config.vocab_size
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * width * seen
    cached = 2.0 * config.num_hidden_layers * config.num_key_value_heads * width * (seen / max(tokens, 1))
    size = model.dtype.itemsize
    return Work(2.0 * (layers * tokens + head * chosen) + attention, passes * (layers + head + cached) * size)


def peaks(model: PreTrainedModel, clock: Callable[[], float]) -> tuple[float, float]:
    """Measured operations and bytes a second of the device: a large matrix product, a large copy."""
    device, cuda = model.device, model.device.type == "cuda"
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=device, dtype=model.dtype) for _ in range(2))
    source = torch.empty(2**28 if cuda else 2**26, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, 8, clock, cuda))
    copy = min(seconds(lambda: target.copy_(source), 8, clock, cuda))
    return 2 * side**3 / product, 2 * source.nbytes / copy


def seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float], cuda: bool) -> list[float]:
    """Seconds of each of ``repeats`` runs, after one that is not counted."""
    found = []
    for turn in range(repeats + 1):
        begun = clock()
        run()
        if cuda:
            torch.cuda.synchronize()
        if turn:
            found.append(clock() - begun)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    p = parser(__doc__ or "")
    p.add_argument("--model", default=tiny_inputs.default_model())
    p.add_argument("--context", type=int, default=256, help="tokens in the cache of a forward that is measured alone")
    p.add_argument("--drafts", type=int, nargs="+", default=[1, 16, 64], help="tokens of such forwards")
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--response-tokens", type=int, default=192)
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--forward-tokens", type=int, default=2048)
    p.add_argument("--micro-batch-tokens", type=int, default=2560)
    args = p.parse_args(arguments)
    use_threads(args.threads)
    clock = busy_clock(args.device)
    model = tiny_inputs.load(args.model, args.device)
    rates = peaks(model, clock)
    figures: dict[str, Value] = {"measured_operations_per_s": rates[0], "measured_bytes_per_s": rates[1]}
    maker = next((v for k, v in MAKERS_FLOPS.items() if args.device == "cuda" and k in torch.cuda.get_device_name()), 0)

    def found(name: str, work: Work, run: Callable[[], object]) -> float:
        took = float(np.median(seconds(run, args.repeats, clock, args.device == "cuda")))
        figures[f"share_{name}"] = work.limit_s(*rates) / took
        figures[f"bound_{name}"] = work.bound(*rates)
        figures[f"median_ms_{name}"] = took * 1000
        return took

    prompts, _ = tiny_inputs.prompts(args.model, args.samples)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        context = torch.ones(1, args.context, dtype=torch.long, device=model.device)
        model(input_ids=context, past_key_values=cache, use_cache=True)
        for tokens in args.drafts:
            draft = torch.ones(1, tokens, dtype=torch.long, device=model.device)

            def one_forward(draft: torch.Tensor = draft) -> None:
                model(input_ids=draft, past_key_values=cache, use_cache=True).logits.argmax(-1).tolist()
                cache.crop(-draft.shape[1])

            seen = tokens * (args.context + (tokens + 1) / 2)
            found(f"forward_{tokens}", forward(model, tokens, int(seen), tokens), one_forward)

    random = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    responses = [random.integers(0, vocabulary, args.response_tokens).astype(np.int32) for _ in prompts]
    options = {"block_size": args.block_size, "keys": range(len(prompts)), "forward_tokens": args.forward_tokens}
    traces = trace(model, prompts, responses, **options)
    # Noisy tokens (the last place of a tail is not forwarded) and clean ones; a noisy token sees about half a stream.
    noisy = sum(len(t.tails) - len(t.accepted) for t in traces)
    stems = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    middle = float(np.mean([len(p) + len(r) / 2 for p, r in zip(prompts, responses, strict=True)]))
    work = forward(
        model, sum(stems) + noisy, int(sum(s * s / 2 for s in stems) + noisy * middle),
        noisy + sum(map(len, responses)), passes=-(-(sum(stems) + noisy) // args.forward_tokens),
    )  # fmt: skip
    took = found("trajectories", work, lambda: trace(model, prompts, responses, **options))
    figures["median_forwarded_tokens_per_s_trajectories"] = (sum(stems) + noisy) / took

    samples = [
        build_sample(
            Trajectory(str(i), p.astype(np.int32), r, False, t.iterations, t.accepted, t.tails),
            args.block_size, Noise(window=1), np.random.default_rng(i),
        )
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]  # fmt: skip
    bins = pack([s.length for s in samples], args.micro_batch_tokens)
    batches = [collate([samples[i] for i in members]).to(model.device) for members in bins]
    total = sum(b.total_tokens for b in batches)
    taught = sum(b.noisy_tokens + b.clean_tokens for b in batches)
    seen = sum(len(s.stem) ** 2 / 2 + sum(len(b.tokens) * b.start for b in s.branches) for s in samples)
    once = forward(model, total, int(seen), taught, passes=len(batches))
    step = Work(3 * once.operations, 3 * once.bytes)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with branch_attention(model):
            for batch in batches:
                forcing_loss(model, batch).total(10.0).backward()

    took = found("train_step", step, train)
    figures["mfu_train_step_measured_rate"] = step.operations / rates[0] / took
    if maker:
        figures["mfu_train_step"] = step.operations / maker / took
    figures["median_tokens_per_s_train_step"] = total / took
    figures["model"] = str(args.model).rsplit("/", 1)[-1]
    report("roofline: measured time against the device's own limits", figures, args.json)


if __name__ == "__main__":
    main()
