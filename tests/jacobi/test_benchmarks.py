"""The other side of the benchmarks is the same computation, and the ablation's bookkeeping is right."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from bench import attention, gpu, published, roofline, tiny_inputs
from bench.ablate import DEFAULT, DirectoryOfAnotherRunError, cell_name, open_directory, page, wanted, write_json
from bench.ablation import Effort, Outcome
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import collate
from jf_cluster.jacobi.samples import Noise, build_sample
from jf_cluster.jacobi.trajectories import trace
from trajectory_store import Trajectory

from .conftest import END, VOCABULARY, oracle_responses, random_prompts

BLOCK = 4


@pytest.mark.parametrize("window", [1, 2, 0])
def test_the_published_layout_has_the_same_loss_and_gradient(qwen2: PreTrainedModel, window: int) -> None:
    prompts = random_prompts([5, 9, 1])
    responses = [np.array(r, dtype=np.int32) for r in oracle_responses(qwen2, prompts, 18)]
    responses.append(np.random.default_rng(0).integers(0, VOCABULARY, 21).astype(np.int32))
    prompts.append(prompts[0])
    traces = trace(qwen2, prompts, responses, block_size=BLOCK, keys=range(4))
    samples = [
        build_sample(
            Trajectory(str(i), p.astype(np.int32), r, r[-1] == END, t.iterations, t.accepted, t.tails),
            BLOCK,
            Noise(window=window),
            np.random.default_rng(i),
        )
        for i, (p, r, t) in enumerate(zip(prompts, responses, traces, strict=True))
    ]
    laid_out = [published.interleave(s, BLOCK, window, torch.device("cpu")) for s in samples]
    for s, r, layout in zip(samples, responses, laid_out, strict=True):
        assert layout.tokens.shape[1] == s.prompt_length + 2 * BLOCK * -(-len(r) // BLOCK)
    qwen2.zero_grad()
    theirs = published.training_loss(qwen2, laid_out, 10.0)
    gradients = [p.grad.clone() for p in qwen2.parameters()]
    qwen2.zero_grad()
    with branch_attention(qwen2):
        ours = forcing_loss(qwen2, collate(samples)).total(10.0)
        ours.backward()
    assert ours.item() == pytest.approx(theirs, rel=1e-5)
    for p, gradient in zip(qwen2.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=2e-4, rtol=2e-3)


def test_ablation_cells_have_names_of_their_own_and_fill_the_table(tmp_path: Path) -> None:
    cells = list(wanted(2))
    names = [cell_name(recipe, seed) for recipe, seed in cells]
    assert len(set(names)) == len(cells) and cells[0] == (DEFAULT, 0)
    open_directory(tmp_path, asdict(Effort()))
    write_json(tmp_path / "models.json", {"base": (1.0, 0.98), "start": (1.2, 0.96)})
    for recipe, tpf in ((DEFAULT, 2.0), (replace(DEFAULT, trajectories="reused"), 1.0)):
        for seed in range(2):
            outcome = Outcome(tpf + seed, 0.95, 1.5, (1.5, tpf + seed), (0.97, 0.95), 60.0)
            write_json(tmp_path / f"{cell_name(recipe, seed)}.json", {"outcome": outcome.__dict__})
    written = page([tmp_path])
    row = "2.50 | 2.00 to 3.00 | 95.0% | 95.0% to 95.0% | 1.50 | 0.50 | 1.50, 97.0% | 2 |"
    assert f"| regenerated (default) | {row}" in written and "\n| reused | 1.50 |" in written
    assert "| window" not in written, "a choice with one cell is no choice"


def test_ablations_of_different_effort_are_not_mixed(tmp_path: Path) -> None:
    for _ in range(2):
        open_directory(tmp_path / "cells", asdict(Effort()))
    with pytest.raises(DirectoryOfAnotherRunError, match="name another"):
        open_directory(tmp_path / "cells", asdict(replace(Effort(), steps=1)))


def test_the_attention_benchmark_measures_backends_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "attention.json"
    arguments = ["--shapes", "40x2", "--block-sizes", "4", "--windows", "1", "0", "--repeats", "1"]
    monkeypatch.setattr(attention, "use_threads", lambda _: None)  # it changes float arithmetic in the whole process
    monkeypatch.setattr("sys.argv", ["attention", *arguments, "--device", "cpu", "--json", str(figures)])
    attention.main()
    found = json.loads(figures.read_text())
    assert {k for k in found if k.startswith("difference")} == {f"difference_sdpa_40x2_n4_w{w}" for w in (1, 0)}
    assert all(found[k] < 1e-5 for k in found if k.startswith("difference"))


def test_the_limits_of_a_forward_are_what_it_computes_and_reads(qwen2: PreTrainedModel) -> None:
    counter = FlopCounterMode(display=False)
    usual = qwen2.config._attn_implementation
    qwen2.set_attn_implementation("eager")  # as matrix products that can be counted
    with counter, torch.inference_mode():
        qwen2(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=False)
    qwen2.set_attn_implementation(usual)
    work = roofline.forward(qwen2, tokens=7, seen=7 * 7, chosen=7)  # eager attention computes all of the square
    assert work.operations == pytest.approx(counter.get_total_flops(), rel=0.001)
    read = sum(p.nbytes for name, p in qwen2.named_parameters() if "embed" not in name and p.dim() == 2)
    assert work.bytes >= read
    assert work.limit_s(1e3, 1e12) == work.operations / 1e3 and work.bound(1e3, 1e12) == "operations"
    assert work.limit_s(1e12, 1e3) == work.bytes / 1e3 and work.bound(1e12, 1e3) == "bytes"


def test_the_roofline_of_the_tiny_model(tmp_path: Path) -> None:
    small = ["--samples", "2", "--response-tokens", "20", "--repeats", "1", "--drafts", "1", "--context", "8"]
    roofline.main([*small, "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("forward_1", "trajectories", "train_step"):
        assert 0 < figures[f"share_{name}"] < 2 and figures[f"bound_{name}"] in ("operations", "bytes")
    assert figures["mfu_train_step_measured_rate"] > 0 and "mfu_train_step" not in figures


def test_models_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_inputs.SHAPES, "small", (32, 64, 2, 4, 2, 50))
    model = tiny_inputs.load("small", "cpu")
    assert (model.dtype, model.config.num_key_value_heads, model.config.vocab_size) == (torch.bfloat16, 2, 50)
    prompts, end = tiny_inputs.prompts("small", 3)
    assert end == 49 and [len(p) for p in prompts] == [tiny_inputs.SHAPE_PROMPT_TOKENS] * 3


def test_the_list_for_a_gpu_asks_for_what_the_benchmarks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command's flags are parsed by its benchmark; what comes after parsing is not run."""

    def parsed(threads: int) -> None:
        raise InterruptedError

    for module, *flags in gpu.LIST.values():
        benchmark = importlib.import_module(f"bench.{module}")
        monkeypatch.setattr(benchmark, "use_threads", parsed)
        monkeypatch.setattr("sys.argv", [module, *flags])
        with pytest.raises(InterruptedError):
            benchmark.main()
