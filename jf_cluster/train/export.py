"""Writing the trained model as a plain Hugging Face directory, from weights that are sharded over the ranks.

Parameters are gathered one after another and written file by file, so no host ever holds more than one output file
of weights and one parameter besides its shards. What transformers fused while loading, such as the experts of a layer,
gets its published names and shapes again. The directory is complete before it gets its name.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from jf_cluster.model_card import write_card
from jf_cluster.models import TOKENIZER_FILES, ModelError, resolve
from jf_cluster.package_decoder import write_decoder
from jf_cluster.train.engine import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_FILE_BYTES = 5 * 10**9


def export_model(model: PreTrainedModel, target: Path, dtype: torch.dtype, base: str) -> None:
    """Write ``model`` in ``dtype``, tokenizer, decoder and card to ``target``; all ranks call this together.

    The tokenizer is that of ``base``; the card gets its table when the model is evaluated. LoRA's adapters are merged.
    """
    writes = dist.get_rank() == 0
    if writes:
        shutil.rmtree(target, ignore_errors=True)  # what ranks that died while exporting left
        target.mkdir(parents=True)
        model.config.use_cache = True
        model.config.dtype = dtype
        model.config.save_pretrained(target)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(target)
        _copy_tokenizer(resolve(base), target)
        write_decoder(target)
        write_card(target, base=base, dtype=str(dtype).removeprefix("torch."))
    files: list[list[str]] = []
    sizes = 0
    pending: dict[str, Tensor] = {}
    pending_bytes = 0
    for name, tensor in _full_tensors(model, writes):
        if not writes:
            continue
        assert tensor is not None
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        size = stored.numel() * stored.element_size()
        if pending and pending_bytes + size > MAX_FILE_BYTES:
            files.append(_write_part(target, len(files), pending))
            pending, pending_bytes = {}, 0
        pending[name] = stored
        pending_bytes += size
        sizes += size
    if writes:
        files.append(_write_part(target, len(files), pending))
        _name_parts(target, files, sizes)
    dist.barrier()


def _full_tensors(model: PreTrainedModel, keep: bool) -> Iterator[tuple[str, Tensor | None]]:
    """Whole tensors as ``save_pretrained`` names and shapes them, in a fixed order, CPU copies where ``keep``.

    A tied tensor comes once; a layer with adapters gives its weight with their product added.
    """
    persistent = set(model.state_dict().keys())
    adapted = {id(layer.base_layer.weight): layer for layer in model.modules() if _has_adapters(layer)}
    for name, parameter in model.named_parameters():  # names a tied parameter once
        if _is_adapter(name):
            continue
        layer = adapted.get(id(parameter))
        adapters = [] if layer is None else [p for n, p in layer.named_parameters() if _is_adapter(n)]
        with deepspeed.zero.GatheredParameters([parameter, *adapters]):
            whole = parameter.detach().to("cpu", copy=True).contiguous() if keep else None
            if layer is not None and whole is not None:
                whole = whole.float() + layer.get_delta_weight(ADAPTER).detach().cpu().float()
        yield from _published(model, name, whole)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield from _published(model, name, buffer.detach().cpu().contiguous() if keep else None)


def _published(model: PreTrainedModel, name: str, whole: Tensor | None) -> Iterator[tuple[str, Tensor | None]]:
    name = name.replace(".base_layer.", ".")
    if whole is None:
        yield name, None
    else:
        yield from revert_weight_conversion(model, {name: whole}).items()


def check_exportable(model: PreTrainedModel) -> None:
    """Make sure that each parameter by itself can be given its published names.

    Raises:
        ModelError: several parameters make up one tensor of the published model.
    """
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            continue
        empty = torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
        for published, _ in _published(model, name, empty):
            if published in found:
                raise ModelError(
                    f"{type(model).__name__} cannot be exported: its checkpoints have {published} for several "
                    f"parameters, {name} among them, and an export writes one parameter at a time"
                )
            found.add(published)


def _lora_layer() -> Any:
    """peft's class of layers with adapters; None where nobody imported peft, so that nobody can have one."""
    return getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", None)


def _has_adapters(layer: nn.Module) -> bool:
    return (kind := _lora_layer()) is not None and isinstance(layer, kind)


def _is_adapter(name: str) -> bool:
    return (kind := _lora_layer()) is not None and any(part in kind.adapter_layer_names for part in name.split("."))


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _write_part(target: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, target / _part(number), metadata={"format": "pt"})
    (target / _part(number)).chmod(0o644)  # safetensors makes it private; others read models on shared storage
    return list(tensors)


def _name_parts(target: Path, files: list[list[str]], total_bytes: int) -> None:
    """Give the files the names transformers looks for, which say how many there are, and index them."""
    if len(files) == 1:
        (target / _part(0)).rename(target / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        (target / _part(i)).rename(target / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in (*TOKENIZER_FILES, "*.py"):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
