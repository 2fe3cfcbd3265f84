"""What ranks compute together: sharded, resumable, the same however many they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.hrm_text import HrmTextConfig, HrmTextForCausalLM

from jf_cluster.config import Config
from jf_cluster.models import ModelError
from jf_cluster.train.checkpoints import CheckpointError, make_loadable, whole_checkpoints
from jf_cluster.train.export import check_exportable
from tests.train.conftest import VOCABULARY, Ranks, job_of, losses, rewind, weights


def test_resumed_and_uninterrupted_and_other_world_sizes_agree(sealed: Config, ranks: Ranks, tmp_path: Path) -> None:
    whole = job_of(sealed, tmp_path / "whole")
    ranks.train(whole, world_size=2)
    reference = losses(whole)
    assert [step for step, *_ in reference] == [1, 2, 3, 4, 5, 6]
    assert reference[-1][1] < reference[0][1] - 0.5

    resumed = rewind(whole, tmp_path / "resumed", to_step=4)
    ranks.train(resumed, world_size=2)
    assert losses(resumed) == reference
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())

    alone = job_of(sealed, tmp_path / "alone")
    ranks.train(alone, world_size=1)
    # Sums in another order: float32 rounding of gradients, which AdamW's normalisation carries into the weights.
    torch.testing.assert_close(torch.tensor(losses(alone)), torch.tensor(reference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights(alone), weights(whole), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_another_number_of_ranks(
    sealed: Config, ranks: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    whole = job_of(sealed, tmp_path / "whole")
    ranks.train(whole, world_size=before)
    moved = rewind(whole, tmp_path / "moved", to_step=2)
    ranks.train(moved, world_size=after)
    torch.testing.assert_close(torch.tensor(losses(moved)), torch.tensor(losses(whole)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights(moved), weights(whole), rtol=1e-3, atol=1e-3)


def steps_counted(config_json: str, directory: str) -> tuple[set[float], int, int]:
    """After the last checkpoint of other ranks was loaded: the optimizer's counts of steps, of how many parts, kept in
    how many places."""
    from jf_cluster.train import checkpoints, engine

    config, made = Config.model_validate_json(config_json), engine.deepspeed_config

    def in_parts(*arguments: Any) -> dict[str, Any]:
        settings = made(*arguments)
        settings["zero_optimization"]["sub_group_size"] = 1000  # its default is as many numbers as a large model has
        return settings

    group = engine.join_group(config)
    engine.deepspeed_config = in_parts
    try:
        ranks = engine.build_engine(config, 1, group, load_universal=True)
        checkpoints.load(ranks, Path(directory), checkpoints.whole_checkpoints(Path(directory))[-1])
        steps = [values["step"] for values in ranks.optimizer.optimizer.state.values()]
        return {float(step) for step in steps}, len(steps), len({step.data_ptr() for step in steps})
    finally:
        engine.deepspeed_config = made  # these processes stay for other tests
        engine.leave_group()


def test_every_part_of_the_optimizer_counts_its_own_steps(sealed: Config, ranks: Ranks, tmp_path: Path) -> None:
    whole = job_of(sealed, tmp_path / "whole")
    ranks.train(whole, world_size=2)
    directory = Path(whole.checkpoints)
    make_loadable(directory, whole_checkpoints(directory)[-1], world_size=1)
    ((steps, parts, places),) = ranks.call(steps_counted, 1, sealed.model_dump_json(), whole.checkpoints)
    assert steps == {6.0} and parts > 3 and places == parts


def test_the_model_is_loaded_onto_the_ranks_device(sealed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once sharded it must not be moved; there is no GPU here that would show it."""
    from jf_cluster.train import engine

    class AskedFor(Exception):
        pass

    def load(config: Config, round_number: int, device: torch.device) -> PreTrainedModel:
        raise AskedFor(str(device))

    monkeypatch.setattr(engine, "load_model", load)
    with pytest.raises(AskedFor, match="cuda:1"):
        engine.build_engine(sealed, 1, engine.Group(1, 2, torch.device("cuda:1")), load_universal=False)


def test_a_checkpoint_that_cannot_be_read_is_named(sealed: Config, ranks: Ranks, tmp_path: Path) -> None:
    """As where a machine lost power; the one before it is still there."""
    whole = job_of(sealed, tmp_path / "whole")
    ranks.train(whole, world_size=2)
    damaged = rewind(whole, tmp_path / "damaged", to_step=4)
    folder = Path(damaged.checkpoints) / "step-000004"
    states = next(folder.glob("*zero_pp_rank_1_*optim_states.pt"))
    states.write_bytes(states.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-000004 .*delete it to go one back"):
        ranks.train(damaged, world_size=2)
    shutil.rmtree(folder)
    ranks.train(damaged, world_size=2)
    assert losses(damaged) == losses(whole)


def partition(config_json: str) -> dict[str, tuple[int, int, int]]:
    """Of each parameter: elements in all, elements this rank keeps, elements of the tensor the model sees."""
    from jf_cluster.train import engine

    config = Config.model_validate_json(config_json)
    group = engine.join_group(config)
    try:
        model = engine.build_engine(config, 1, group, load_universal=False).module.model
        return {n: (p.ds_numel, p.ds_tensor.numel(), p.numel()) for n, p in model.named_parameters()}
    finally:
        engine.leave_group()


def test_every_rank_keeps_its_part_of_every_parameter_only(sealed: Config, ranks: Ranks) -> None:
    first, second = ranks.call(partition, 2, sealed.model_dump_json())
    assert first.keys() == second.keys() and len(first) == 26
    for name, (whole, kept, seen) in first.items():
        assert kept == -(-whole // 2) and seen == 0, name  # halves, padded to equal size
        assert second[name][1] == kept


MOST_BYTES = 30_000
"""In one file of weights."""


def gathered_after_export(config_json: str, target: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
    """Weights as the ranks hold them, gathered here after the same ranks exported them, and what was held meanwhile:

    for every parameter that was gathered, the bytes that wait in memory to be written and those gathered on this rank.
    """
    import deepspeed
    from safetensors.torch import save_file

    from jf_cluster.train import engine, export

    config = Config.model_validate_json(config_json)
    group = engine.join_group(config)
    try:
        model = engine.build_engine(config, 1, group, load_universal=False).module.model
        waiting: dict[str, int] = {}
        held: list[tuple[int, int]] = []
        most, gathering = export.MAX_FILE_BYTES, export._full_tensors

        def watched(model: PreTrainedModel, keep: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
            for name, tensor in gathering(model, keep):
                waiting[name] = 0 if tensor is None else tensor.nbytes
                held.append((sum(waiting.values()), sum(p.nbytes for p in model.parameters())))
                yield name, tensor

        def write(tensors: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> None:
            save_file(tensors, *arguments, **options)
            for name in tensors:
                del waiting[name]

        export.MAX_FILE_BYTES, export._full_tensors, export.save_file = MOST_BYTES, watched, write
        try:
            export.export_model(model, Path(target), torch.float32, config.model.base)
        finally:
            # These processes stay for other tests.
            export.MAX_FILE_BYTES, export._full_tensors, export.save_file = most, gathering, save_file
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters()}, held
    finally:
        engine.leave_group()


def test_the_export_is_the_gathered_weights_and_loads_in_transformers(
    sealed: Config, ranks: Ranks, tmp_path: Path
) -> None:
    (gathered, held), (_, beside) = ranks.call(
        gathered_after_export, 2, sealed.model_dump_json(), str(tmp_path / "export")
    )
    sizes = [weight.nbytes for weight in gathered.values()]
    assert max(waiting for waiting, _ in held) <= MOST_BYTES + max(sizes) < sum(sizes) / 2
    assert {waiting for waiting, _ in beside} == {0}, "the other rank keeps nothing"
    assert {whole for _, whole in held + beside} == {0}, "a parameter is sharded again before the next is gathered"
    assert len(list((tmp_path / "export").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "export" / "custom_generate" / "generate.py").is_file()
    assert "Not evaluated yet." in (tmp_path / "export" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.use_cache
    loaded = dict(model.named_parameters())
    assert loaded.keys() == gathered.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in gathered.items())


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 1,
}  # fmt: skip
MIXTURES = {
    "qwen3": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_exported_as_they_are_published(
    configured: Callable[..., Config], base: Path, ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    """transformers holds a layer's experts in two tensors, while checkpoints have each expert's by itself."""
    mixture, experts = MIXTURES[kind]
    published = tmp_path / kind
    AutoModelForCausalLM.from_config(mixture(**SIZES, **experts)).save_pretrained(published)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, published / name)
    config = configured(model=published)
    ranks.call(gathered_after_export, 2, config.model_dump_json(), str(tmp_path / "export"))
    expected = load_file(published / "model.safetensors")
    found = {n: t for file in (tmp_path / "export").glob("*.safetensors") for n, t in load_file(file).items()}
    assert found.keys() == expected.keys() and sum(".experts.3." in name for name in found) == 6
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_what_several_parameters_make_up_is_refused() -> None:
    config = HrmTextConfig(**SIZES | {"num_key_value_heads": 2})
    with (
        torch.device("meta"),
        pytest.raises(ModelError, match=r"HrmTextForCausalLM cannot be exported: .*gqkv_proj"),
    ):
        check_exportable(HrmTextForCausalLM(config))


def test_a_checkpoint_of_another_training_is_refused(sealed: Config, ranks: Ranks, tmp_path: Path) -> None:
    first = job_of(sealed, tmp_path / "job")
    ranks.train(first, world_size=2)
    other = job_of(sealed, tmp_path / "job", identity="other")
    with pytest.raises(CheckpointError, match="made with other data"):
        ranks.train(other, world_size=2)
