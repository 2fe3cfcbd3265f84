"""The formulas of memory against what PyTorch allocates, and against sums made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from jf_cluster.config import TINY_BASE, Config
from jf_cluster.config import LoraConfig as LoraSettings
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.layout import Forest
from jf_cluster.jacobi.loss import forcing_loss
from jf_cluster.jacobi.packing import PackedBatch, collate
from jf_cluster.jacobi.samples import NoisyBranch, Sample
from jf_cluster.jacobi.sampling import Sampling
from jf_cluster.jacobi.support import UnsupportedModelError
from jf_cluster.models import ModelError
from jf_cluster.planning import memory, speed
from jf_cluster.planning.fitting import changed
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.scaling import model_7b, model_70b
from jf_cluster.planning.shapes import read_shape, shape_of

DTYPES = {torch.float32: 4, torch.bfloat16: 2}
TOKENS = 96


def small(vocabulary: int = 64, layers: int = 3) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


def test_shapes_are_read_without_weights() -> None:
    shape = shape_of(AutoConfig.from_pretrained(TINY_BASE))
    assert shape.parameters == sum(t.numel() for t in load_file(TINY_BASE / "model.safetensors").values())
    assert shape.multiplied == shape.parameters, "tied: the embedding is also the head"
    assert (shape.head_width, shape.kv_width, shape.context_tokens) == (32, 64, 2048)
    # The sizes their model cards give: 7.61 and 70.6 billion.
    assert shape_of(model_7b()).parameters == 7_615_616_512
    assert shape_of(model_70b()).parameters == 70_553_706_496
    assert shape_of(model_7b()).multiplied == 7_615_616_512 - 152_064 * 3584


def test_models_that_cannot_be_used_are_told_by_their_config() -> None:
    sliding = Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=0, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        shape_of(sliding)
    with pytest.raises(ModelError, match=r"model\.path: no model at ./nowhere"):
        read_shape(Config.model_validate({"model": {"path": "./nowhere"}}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, checkpointing: bool) -> None:
    model = Qwen2ForCausalLM(small()).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.numel() >= TOKENS:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    forest = Forest((TOKENS,), ())
    with branch_attention(model, "sdpa"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tokens = torch.randint(0, 64, (1, TOKENS))
        model.base_model(input_ids=tokens, position_ids=forest.position_ids, use_cache=False, layout=forest)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    shape = shape_of(small())
    expected = memory.activation_bytes(shape, TOKENS, DTYPES[dtype], checkpointing)
    if checkpointing:  # the one layer that is computed again is not there before the backward pass
        one, two = (memory.activation_bytes(shape_of(small(layers=n)), TOKENS, DTYPES[dtype], False) for n in (1, 2))
        expected -= two - one
    else:  # what the CPU's kernel gives is what the next matrix takes
        expected -= shape.layers * TOKENS * DTYPES[dtype] * shape.query_width
    expected -= TOKENS * DTYPES[dtype] * 64  # the final norm's output, which only the loss will keep
    # What the count leaves out: rotary tables, positions and token ids.
    assert expected <= found <= 1.03 * expected


def batch(vocabulary: int) -> PackedBatch:
    """192 taught positions, half of them noisy."""
    rng = torch.Generator().manual_seed(0)
    stem, noisy = (torch.randint(0, vocabulary, (n,), generator=rng).numpy() for n in (112, 96))
    taught = torch.ones(96, dtype=torch.bool).numpy()
    return collate([Sample(16, stem, (NoisyBranch(17, noisy, taught, taught * 0.5),))])


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes allocated at a time while ``call`` runs, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events)]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_the_loss(dtype: torch.dtype) -> None:
    peaks, chunk, sizes = [], 48, (2000, 8000)
    for vocabulary in sizes:
        model = Qwen2ForCausalLM(small(vocabulary, layers=1)).to(dtype).train()
        made = batch(vocabulary)

        def step(model: Qwen2ForCausalLM = model, made: PackedBatch = made) -> None:
            with branch_attention(model, "sdpa"):
                forcing_loss(model, made, chunk_tokens=chunk).total(10.0).backward()

        peaks.append(peak_bytes(step))
    grown = sizes[1] - sizes[0]
    gradient = grown * 64 * DTYPES[dtype]  # of the head's weight
    measured = (peaks[1] - peaks[0] - gradient) / grown / chunk
    assert 0.85 * memory.LOSS_LOGIT_BYTES < measured <= memory.LOSS_LOGIT_BYTES


def test_logits_of_sampling() -> None:
    logits, keys = torch.randn(64, 4000).bfloat16(), torch.arange(64)
    measured = 2 + peak_bytes(lambda: Sampling(0.8).choose(logits, keys, keys)) / logits.numel()
    assert 0.9 * memory.SAMPLED_LOGIT_BYTES < measured <= memory.SAMPLED_LOGIT_BYTES


def test_model_states_are_those_of_deepspeed() -> None:
    shape = shape_of(model_70b())
    largest = 128_256 * 8192
    assert shape.largest_layer == largest
    host, device = memory.zero3_states(shape, 8, 8, "none", 2)
    assert device == pytest.approx(4 * largest + 18 * shape.parameters / 64)
    host, device = memory.zero3_states(shape, 8, 1, "all", 2)
    assert (device, host) == (4 * largest, pytest.approx(18 * 1.5 * shape.parameters))
    wide = memory.zero3_states(shape, 8, 8, "none", 4)[1] - memory.zero3_states(shape, 8, 8, "none", 2)[1]
    assert wide == pytest.approx(2 * shape.parameters / 64, rel=1e-6), "float32 weights"


def test_a_rank_by_hand(planned: Callable[..., Config]) -> None:
    config = planned(train__micro_batch_tokens=32_768, train__loss_chunk_tokens=1024)
    host, rank = memory.training(config, read_shape(config), 1)
    parameters, width = 7_615_616_512, 3584
    layer = 2 * 8 * width + 2 * (3 * width + 2 * 512) + 4 * 28 + 8 * 18_944
    assert rank.parts == {
        "weights, gradients and optimizer": pytest.approx(18 * parameters / 8 + 4 * 152_064 * width, abs=1),
        "gathered weights and gradients": 2 * 1_500_000_000,
        "activations": 32_768 * (28 * 2 * width + layer + 8 * width),
        "logits": 16 * 1024 * 152_064,
    }
    assert host.parts["processes"] == 8 * (500 << 20)
    # A sample is never cut: one of the longest response and as many noisy tokens does not fit a small budget.
    small = changed(config, {"train.micro_batch_tokens": 1024, "collect.max_new_tokens": 2048})
    assert memory.longest_micro_batch(small) == 512 + 2 * 2048


def test_adapters_are_those_of_peft(planned: Callable[..., Config]) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", bias="none")
    model = inject_adapter_in_model(settings, Qwen2ForCausalLM(small()))
    found = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert shape_of(small()).adapter_parameters(4) == found
    config = planned("70B", train__lora=LoraSettings(rank=4))
    shape = read_shape(config)
    adapters = shape.adapter_parameters(4)
    _, rank = memory.training(config, shape, 1)
    states = 18 * adapters / 8 + 2 * shape.parameters / 8 + 4 * shape.largest_layer
    assert rank.parts["weights, gradients and optimizer"] == pytest.approx(states, abs=2)
    assert memory.checkpoint_bytes(config, shape) == 2 * shape.parameters + 12 * adapters
    full = speed.training(planned("70B"), shape, Machines.thought_of("8xH100"))
    assert speed.training(config, shape, Machines.thought_of("8xH100")).compute_s == pytest.approx(
        0.75 * full.compute_s
    )


def test_a_collector_by_hand(planned: Callable[..., Config]) -> None:
    config = planned(collect__batch_prompts=128, collect__max_new_tokens=2048, collect__forward_tokens=65_536)
    shape = read_shape(config)
    kv = 2 * 28 * 4 * 128 * 2
    assert memory.collecting(config, shape).parts == {
        "weights": 7_615_616_512 * 2,
        "cache of responses": 128 * (512 + 2048) * kv,
        "cache of trajectories": 0,  # they come with the responses
        "activations": 65_536 * 2 * (3 * 18_944 + 4 * 3584),
        "logits": 65_536 * 152_064 * 2,
    }
    two = memory.collecting(changed(config, {"collect.responses": "base"}), shape)
    assert two.parts["weights"] == 2 * 7_615_616_512 * 2, "the base answers, the newest model iterates"
    assert two.parts["cache of trajectories"] == 65_536 * kv


def test_disk_by_hand(planned: Callable[..., Config]) -> None:
    config = planned(prompts__per_round=1000, collect__max_new_tokens=100, collect__block_size=(16, 32), rounds=2)
    stored, run = memory.disk(config, read_shape(config))
    # Two rounds and the collection after the last one; ids of a large vocabulary take 32 bits.
    assert stored == pytest.approx(1000 * 100 * 9.7 * (1 + 2 + 2), abs=1)
    assert run.parts == {"checkpoints": 4 * 14 * 7_615_616_512, "models": 2 * 2 * 7_615_616_512}
