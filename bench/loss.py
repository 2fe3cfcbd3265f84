"""``python -m bench.loss``: memory and time of the chunked loss against the plain one at a 150k vocabulary.

The plain form holds float32 logits of every taught position, their log-softmax and the gradients at once. Peak
memory is measured in a fresh process a side on CPU (resident set above what it was before the step), and by the
allocator on a GPU; time in alternation in one process.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.measure import (
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
from jf_cluster.jacobi.packing import PackedBatch, collate
from jf_cluster.jacobi.samples import NoisyBranch, Sample

VOCABULARY = 151_936
CHUNK_TOKENS = 32
"""A sixteenth of the positions of the CPU preset, as 1,024 are of 16,384 in a micro-batch on a GPU."""


def make(device: str, tokens: int, hidden: int) -> tuple[Qwen2ForCausalLM, PackedBatch]:
    """A one-layer model and a batch of about ``tokens`` taught positions, half of them noisy."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 2, num_hidden_layers=1,
        num_attention_heads=hidden // 32, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device)
    random = np.random.default_rng(0)
    half = tokens // 2
    stem = random.integers(0, VOCABULARY, size=half + 16)
    branch = random.integers(0, VOCABULARY, size=half - 16)
    noisy = NoisyBranch(17, branch, np.ones(len(branch), bool), np.full(len(branch), 0.5))
    return model, collate([Sample(16, stem, (noisy,))]).to(torch.device(device))


def chunked(model: Qwen2ForCausalLM, batch: PackedBatch) -> float:
    model.zero_grad(set_to_none=True)
    with branch_attention(model, "sdpa"):
        loss = forcing_loss(model, batch, chunk_tokens=CHUNK_TOKENS).total(10.0)
        loss.backward()
    return loss.item()


def plain(model: Qwen2ForCausalLM, batch: PackedBatch) -> float:
    """All logits at once, in float32, as the published trainers compute it."""
    model.zero_grad(set_to_none=True)
    with branch_attention(model, "sdpa"):
        logits = (
            model(input_ids=batch.tokens, position_ids=batch.forest.position_ids, use_cache=False, layout=batch.forest)
            .logits[0]
            .float()
        )
        clean, noisy = logits[batch.clean], logits[batch.noisy]
        teacher = clean.detach().log_softmax(-1)[batch.mirrors]
        consistency = (teacher.exp() * (teacher - noisy.log_softmax(-1))).sum() / batch.noisy_tokens
        loss = consistency + 10.0 * cross_entropy(clean, batch.targets)
        loss.backward()
    return loss.item()


SIDES = {"chunked": chunked, "plain": plain}


def peak_of(side: str, device: str, threads: int, tokens: int, hidden: int) -> int:
    """Peak memory of one step above the model; the gradients' place is included on both sides alike."""
    use_threads(threads)
    model, batch = make(device, tokens, hidden)
    return peak_bytes(lambda: SIDES[side](model, batch), device)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tokens", type=int, default=512, help="taught positions, clean and noisy together")
    p.add_argument("--hidden", type=int, default=64)
    p.set_defaults(repeats=2)
    args = p.parse_args()
    use_threads(args.threads)
    peaks = {s: in_fresh_process(peak_of, s, args.device, args.threads, args.tokens, args.hidden) for s in SIDES}
    model, batch = make(args.device, args.tokens, args.hidden)
    values, gradients = {}, {}
    for name, run in SIDES.items():
        values[name] = run(model, batch)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    apart = (gradients["chunked"] - gradients["plain"]).norm() / gradients["plain"].norm()
    del gradients
    sides = {name: lambda run=run: run(model, batch) for name, run in SIDES.items()}
    seconds = alternate(sides, args.repeats, args.device, busy_clock(args.device))
    figures = {
        "ratio_peak_memory_vs_plain": peaks["chunked"] / peaks["plain"],
        "ratio_time_vs_plain": ratio(seconds["chunked"], seconds["plain"]),
        "loss_difference": abs(values["chunked"] - values["plain"]),
        "gradient_difference_relative": apart.item(),
        "loss_plain": values["plain"],
        "peak_mib_chunked": peaks["chunked"] / 2**20,
        "peak_mib_plain": peaks["plain"] / 2**20,
        "median_s_chunked": median(seconds["chunked"]),
        "median_s_plain": median(seconds["plain"]),
        "vocabulary": VOCABULARY,
        "tokens": args.tokens,
    }
    report("loss: chunked against plain", figures, args.json)


if __name__ == "__main__":
    main()
