"""Models and tokenizers on disk: finding, loading, fingerprinting them, and the tokens that end a response.

Weights are read from safetensors only. How a trained model is written is in `jf_cluster.train.export`.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from jf_cluster.config import Config
from jf_cluster.startup import imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
    "*.model",
)
"""Glob patterns of the files a tokenizer consists of, over all tokenizer kinds of the hub."""
VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
"""Of these, every tokenizer has at least one."""
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json")


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message says which and what to do."""


def use_cpu(cpus: float) -> None:
    """Compute with ``cpus`` threads in this process and take numbers too small for a normal float as zero.

    A trained model is so sure of its tokens that probabilities and gradients become denormal, and a CPU computes with
    those many times slower than with zero: training steps took 1.3 times as long. Call it before anything is computed.
    """
    torch.set_num_threads(max(1, int(cpus)))
    torch.set_flush_denormal(True)


def is_hub_id(path: str) -> bool:
    """Whether ``path`` can only be the name of a model on the hub: no directory, and of the form owner/name."""
    return not (Path(path).is_dir() or Path(path).is_absolute() or path.startswith(".")) and path.count("/") == 1


def resolve(path: str) -> Path:
    """Directory that holds the model ``path`` names: itself, or a hub id's local snapshot (fetched when missing).

    Raises:
        ModelError: no such directory and not a hub id that can be fetched, or a directory without weights.
    """
    directory = Path(path)
    if not directory.is_dir():
        if not is_hub_id(path):
            raise ModelError(f"no model at {path}: the directory does not exist")
        directory = _snapshot(path)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is not a model directory: it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{directory} has no weights (*.safetensors); other formats are not read because they can run code "
            "when loaded: convert them with transformers' save_pretrained"
        )
    return directory


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*MODEL_FILES, *TOKENIZER_FILES, "*.py"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"no model {repository}: neither a local directory nor a model that can be fetched from the hub ({error})"
        ) from error


def load_model(config: Config, round_number: int, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Model ``round_number`` (0 is the base) in the configured dtype, in evaluation mode, on ``device``.

    Raises:
        ModelError: it is missing or incomplete.
    """
    dtype, trust = getattr(torch, config.model.dtype), config.model.trust_remote_code
    return load_checkpoint(config.model_dir(round_number), dtype=dtype, device=device, trust_remote_code=trust)


def load_checkpoint(
    path: str, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model ``path`` names (as in :func:`resolve`), in evaluation mode; dtype "auto" is the one it was saved in.

    Raises:
        ModelError: it is missing, incomplete, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    directory = resolve(path)
    imported()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",  # for plain use; jacobi.attention puts its own in place where needed
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the model in {directory} cannot be loaded: {error}") from error
    return model.to(device).eval()


def reload_weights(model: PreTrainedModel, path: str) -> bool:
    """Put the weights of ``path`` in the place of a model's own, tensor by tensor, without a second copy of it.

    The model's configuration is taken to be that of ``path``.

    Returns:
        Whether that could be done. It cannot where the files name or shape tensors otherwise than the model does, as
        for architectures that transformers converts while loading: load such a model anew. Nothing has changed then.

    Raises:
        ModelError: as in :func:`resolve`.
    """
    files = sorted(resolve(path).glob("*.safetensors"))
    own = model.state_dict(keep_vars=True)
    tied = {parameter.data_ptr() for parameter in own.values()}
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    if any(name not in own or list(own[name].shape) != shape for name, shape in shapes.items()):
        return False
    if tied != {own[name].data_ptr() for name in shapes}:
        return False
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt", device=str(model.device)) as stored:
                for name in stored.keys():  # noqa: SIM118
                    own[name].copy_(stored.get_tensor(name))
    return True


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, which every round shares.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    return tokenizer_of(config.model.base, config.model.trust_remote_code)


def tokenizer_of(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the directory ``path`` names; errors as in :func:`load_tokenizer`."""
    from transformers import AutoTokenizer

    directory = resolve(path)
    if not any(any(directory.glob(pattern)) for pattern in VOCABULARY_FILES):
        # transformers would go on with a tokenizer that knows no words.
        raise ModelError(f"{directory} has no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has no tokenizer that transformers can read: {error}") from error


def model_hash(path: str) -> str:
    """SHA-256 over names and contents of a model's weights and configuration; ``path`` as in :func:`resolve`.

    Tokenizer and lineage files do not take part: the same weights give the same hash wherever they lie.
    """
    directory = resolve(path)
    files = sorted(
        {f for pattern in MODEL_FILES for f in directory.glob(pattern) if f.name != "generation_config.json"}
    )
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_file_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.name}\0{digest}\n".encode())
    return whole.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what maps text to ids: the tokenizer's rules and vocabulary, its end token and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are left behind by whoever called the tokenizer last; they are not its identity.
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    identity = {"rules": rules, "end": tokenizer.eos_token, "template": getattr(tokenizer, "chat_template", None)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response, ascending: all of the generation configuration's and the tokenizer's own.

    Raises:
        ModelError: neither names one, so no response would ever end by itself.
    """
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    if not found:
        raise ModelError(
            "neither the model's generation_config.json nor its tokenizer names an end token (eos_token_id)"
        )
    return sorted(found)
