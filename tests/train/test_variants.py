"""Other ways to the same round: adapters instead of all weights, less memory on the device, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.config import Config
from jf_cluster.models import ModelError
from tests.train.conftest import Ranks, job_of, losses, rewind, seal, weights

LORA = {"rank": 2, "alpha": 8.0}


def trained(config: Config, ranks: Ranks, directory: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Steps, losses and gradient norms, and the weights that came out of two ranks."""
    job = job_of(config, directory)
    ranks.train(job, 2)
    return torch.tensor(losses(job)), weights(job)


def test_what_saves_memory_changes_nothing(configured: Callable[..., Config], ranks: Ranks, tmp_path: Path) -> None:
    seal(configured())
    plain = trained(configured(), ranks, tmp_path / "plain")
    again = trained(configured(gradient_checkpointing=True), ranks, tmp_path / "checkpointing")
    assert torch.equal(again[0], plain[0]) and all(torch.equal(w, again[1][n]) for n, w in plain[1].items())
    for what in ("optimizer", "all"):
        zero = {"offload": what, "persistence_threshold": 0}
        offloaded = trained(configured(zero=zero), ranks, tmp_path / what)
        # DeepSpeed sums the gradient norm in another order there: rounding, which clipping carries into the weights.
        torch.testing.assert_close(offloaded[0], plain[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(offloaded[1], plain[1], rtol=1e-3, atol=1e-4)


def kept_for_backward(config_json: str) -> int:
    """Bytes that one forward pass keeps for its backward pass, weights not counted."""
    from jf_cluster.jacobi.attention import branch_attention
    from jf_cluster.train import engine
    from jf_cluster.train.batches import BatchSource
    from jf_cluster.train.plan import MicroBatch
    from trajectory_store import SealedRows, TrajectoryStore

    config = Config.model_validate_json(config_json)
    group = engine.join_group(config)
    try:
        ranks = engine.build_engine(config, 1, group, load_universal=False)
        source = BatchSource(SealedRows(TrajectoryStore(config.store_url).round(1)), config, 1, group.device)
        batch = source.batch(MicroBatch(0, (0, 1, 2)))
        sizes: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.ds_tensor.data_ptr() for p in ranks.module.parameters()}
        with (
            branch_attention(ranks.module.model, config.model.attention),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            ranks(batch, torch.ones(2, dtype=torch.float64))
        return sum(size for storage, size in sizes.items() if storage not in parameters)
    finally:
        engine.leave_group()


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(
    configured: Callable[..., Config], ranks: Ranks
) -> None:
    seal(configured())
    [usual], [less] = (
        ranks.call(kept_for_backward, 1, configured(gradient_checkpointing=on).model_dump_json())
        for on in (False, True)
    )
    assert 0 < less < usual / 2


def test_bfloat16_learns_and_resumes_exactly(configured: Callable[..., Config], ranks: Ranks, tmp_path: Path) -> None:
    """The optimizer's float32 weights are in the checkpoint; the bfloat16 ones are made from them."""
    config = configured(dtype="bfloat16")
    seal(config)
    whole = job_of(config, tmp_path / "whole")
    ranks.train(whole, 2)
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    assert {w.dtype for w in weights(whole).values()} == {torch.bfloat16}
    resumed = rewind(whole, tmp_path / "resumed", to_step=2)
    ranks.train(resumed, 2)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())


def adapted_logits(config_json: str, target: str) -> torch.Tensor:
    """What a sharded model with adapters that are no longer zero says, before it is exported."""
    import deepspeed

    from jf_cluster.train import engine, export

    config = Config.model_validate_json(config_json)
    group = engine.join_group(config)
    try:
        ranks = engine.build_engine(config, 1, group, load_universal=False)
        model = ranks.module.model.eval()
        adapters = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(adapters, modifier_rank=0):
            for number, adapter in enumerate(adapters):
                adapter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            logits = model(torch.arange(2, 40)[None]).logits
        export.export_model(model, Path(target), torch.float32, config.model.base)
        return logits
    finally:
        engine.leave_group()


def test_adapters_are_merged_into_a_plain_model(
    configured: Callable[..., Config], base: Path, ranks: Ranks, tmp_path: Path
) -> None:
    config = configured(lora=LORA)
    seal(config)
    logits, _ = ranks.call(adapted_logits, 2, config.model_dump_json(), str(tmp_path / "export"))
    merged, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "export", base))
    assert merged.state_dict().keys() == before.state_dict().keys()
    with torch.no_grad():
        ids = torch.arange(2, 40)[None]
        # x·W + s·(x·A)·B against x·(W + s·A·B): rounding alone.
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert (before(ids).logits - logits).abs().max() > 0.1


def test_adapters_of_the_head_are_refused(configured: Callable[..., Config]) -> None:
    """The loss applies the head's weight by itself: its adapters would stay as they were drawn."""
    from jf_cluster.train import engine

    lora = configured(lora=LORA).train.lora
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ModelError, match=r"target_modules: lm_head cannot have adapters"):
        engine._add_adapters(model, lora.model_copy(update={"target_modules": ("q_proj", "lm_head")}))


def test_adapters_alone_are_trained_saved_and_resumed(
    configured: Callable[..., Config], base: Path, ranks: Ranks, tmp_path: Path
) -> None:
    config = configured(lora=LORA, learning_rate=5e-2, steps=8)
    seal(config)
    whole = job_of(config, tmp_path / "whole")
    ranks.train(whole, 2)
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.1
    before = load_file(base / "model.safetensors")
    for name, weight in weights(whole).items():
        change = torch.linalg.matrix_rank(weight - before[name], atol=1e-5) if weight.ndim == 2 else 0
        assert change == LORA["rank"] if "_proj.weight" in name else torch.equal(weight, before[name]), name

    resumed = rewind(whole, tmp_path / "resumed", to_step=4)
    ranks.train(resumed, 2)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())
    moved = rewind(whole, tmp_path / "moved", to_step=4)
    ranks.train(moved, 1)
    torch.testing.assert_close(weights(moved), weights(whole), rtol=1e-3, atol=1e-3)
    full = tmp_path / "full"
    ranks.train(job_of(configured(), full), 2)
    files = "checkpoints/step-000006/*.pt"
    adapters, everything = (sum(f.stat().st_size for f in d.glob(files)) for d in (tmp_path / "whole", full))
    assert adapters < everything / 3
