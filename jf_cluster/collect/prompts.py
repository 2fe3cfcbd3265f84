"""Prompts: read, told apart into training and held-out ones, tokenized and given to rounds.

A text is held out exactly when its SHA-256 digest says so (one of 16), so training and held-out prompts never overlap
whatever the order of the data set, and each round of ``fresh`` prompts has a slice of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from jf_cluster.config import Config, PromptsConfig, Template
from jf_cluster.tiny.problems import Split, problem, split_of

LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

TINY_SEED = 1_000_000
"""Generated training prompts come from streams of their own, not from the ones the shipped base was trained on."""

READ_ROWS = 1000


class PromptsError(ValueError):
    """The prompts a configuration asks for cannot be had; the message says what is wrong and what to change."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model is given it.

    ``prompt_id`` is a digest of the text, so one text is one prompt wherever it stands in the data; ``tokens`` int32
    [P], the chat template included; ``answer`` is the reference answer where the source has one.
    """

    prompt_id: str
    tokens: np.ndarray
    text: str
    answer: str | None


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, round_number: int) -> list[Prompt]:
    """Give the training prompts of a round, ``prompts.per_round`` of them.

    Raises:
        PromptsError: the source cannot be read, lacks the column, or has too few training prompts.
    """
    settings = config.prompts
    skipped = (round_number - 1) * settings.per_round if settings.fresh else 0
    chosen = list(itertools.islice(_texts(config, "train"), skipped, skipped + settings.per_round))
    if len(chosen) < settings.per_round:
        raise _too_few(config, round_number)
    return [tokenized(text, answer, tokenizer, settings.template) for text, answer in chosen]


def _too_few(config: Config, round_number: int) -> PromptsError:
    settings = config.prompts
    needed = settings.per_round * (round_number if settings.fresh else 1)
    there = sum(1 for _ in itertools.islice(_texts(config, "train"), needed))
    return PromptsError(
        f"collecting up to round {round_number} needs {needed} distinct training prompts and {settings.source} has "
        f"{there} (one of 16 is held out): lower prompts.per_round"
        + (" or set prompts.fresh=false to use the same prompts in every round" if settings.fresh else "")
    )


def check_prompts(config: Config, last_round: int) -> None:
    """Make sure that there are prompts for evaluation and for every round up to ``last_round``.

    Raises:
        PromptsError: as ``load_prompts`` and ``held_out_prompts``.
    """
    settings = config.prompts
    if settings.source == "tiny":
        return
    needed = {"train": settings.per_round * (last_round if settings.fresh else 1), "heldout": settings.held_out}
    found = {"train": 0, "heldout": 0}
    for split in _splits(config):
        found[split] += 1
        if all(found[name] >= needed[name] for name in needed):
            return
    if found["train"] < needed["train"]:
        raise _too_few(config, last_round)
    raise _too_few_held_out(settings, found["heldout"])


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Give the first ``prompts.held_out`` prompts that are kept aside for evaluation.

    Raises:
        PromptsError: the source cannot be read, lacks the column, or has too few held-out prompts.
    """
    settings = config.prompts
    chosen = list(itertools.islice(_texts(config, "heldout"), settings.held_out))
    if len(chosen) < settings.held_out:
        raise _too_few_held_out(settings, len(chosen))
    return [tokenized(text, answer, tokenizer, settings.template) for text, answer in chosen]


def _too_few_held_out(settings: PromptsConfig, there: int) -> PromptsError:
    return PromptsError(
        f"{there} texts of {settings.source} are held out (one of 16, by a digest of the text) and prompts.held_out "
        f"asks for {settings.held_out}: lower it or use a larger data set"
    )


def _splits(config: Config) -> Iterator[Split]:
    """Yield the split of every distinct text."""
    seen: set[bytes] = set()
    for text, _ in _rows(config):
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield split_of(text)


def _texts(config: Config, split: Split) -> Iterator[tuple[str, str | None]]:
    """Yield the distinct texts of a split with their answers, always in the same order."""
    seen: set[bytes] = set()
    rows = _tiny(config.seed, split) if config.prompts.source == "tiny" else _rows(config)
    for text, answer in rows:
        if split_of(text) != split:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield text, answer


def _tiny(seed: int, split: Split) -> Iterator[tuple[str, str | None]]:
    """Yield generated problems; the held-out ones are the same whatever the seed."""
    stream = 0 if split == "heldout" else TINY_SEED + seed
    for index in itertools.count():
        drawn = problem(split, stream, index)
        yield drawn.question, str(drawn.answer)


def _rows(config: Config) -> Iterator[tuple[str, str | None]]:
    """Yield text and answer of every row of a data set, in an order that depends on the seed alone."""
    settings = config.prompts
    data = read_dataset(settings.source, settings.subset, settings.split, "prompts.source")
    columns = [settings.column] + ([settings.answer_column] if settings.answer_column else [])
    for name in columns:
        if name not in data.column_names:
            raise PromptsError(
                f"{settings.source} has no column {name!r}; it has {', '.join(data.column_names)}: "
                "set prompts.column (and prompts.answer_column)"
            )
    if len(data) == 0:
        raise PromptsError(f"{settings.source} has no rows")
    shuffled = data.select_columns(columns).shuffle(seed=config.seed)
    for batch in shuffled.iter(batch_size=READ_ROWS):
        answers = batch[settings.answer_column] if settings.answer_column else itertools.repeat(None)
        for text, answer in zip(batch[settings.column], answers, strict=False):
            if not isinstance(text, str):
                raise PromptsError(
                    f"column {settings.column!r} of {settings.source} holds {type(text).__name__}, not text"
                )
            yield text, _as_text(answer)


def _as_text(answer: object) -> str | None:
    """A reference answer as text; a list, such as MBPP's tests, as JSON."""
    return json.dumps(answer) if isinstance(answer, list) else None if answer is None else str(answer)


def read_dataset(source: str, subset: str | None, split: str, setting: str) -> datasets.Dataset:
    """Read a local file, or a data set of the Hugging Face hub; ``setting`` is the one to name in messages.

    Raises:
        PromptsError: it cannot be read or has no rows.
    """
    datasets.disable_progress_bars()
    path = Path(source)
    kind = next((kind for suffix, kind in LOCAL_FORMATS.items() if path.name.endswith(suffix)), None)
    try:
        if kind is not None:
            if not path.is_file():
                raise PromptsError(f"there is no file {path} ({setting})")
            # `datasets` fails on empty files with messages about other things.
            if path.stat().st_size == 0 or (kind == "parquet" and parquet.read_metadata(path).num_rows == 0):
                raise PromptsError(f"{path} ({setting}) is empty: it has no rows")
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        return datasets.load_dataset(source, subset, split=split)
    except DatasetNotFoundError as error:
        raise PromptsError(
            f"{source} ({setting}) is neither 'tiny', nor a .json, .jsonl or .parquet file, nor a data set that can be "
            f"reached: {error}"
        ) from error
    except (DatasetGenerationError, pyarrow.ArrowException, ConnectionError, ValueError) as error:
        if isinstance(error, PromptsError):
            raise
        reason = error.__cause__ or error
        raise PromptsError(f"{source} ({setting}) cannot be read: {reason}") from error


def in_chat(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether prompts are messages of a conversation rather than text to be continued.

    Raises:
        PromptsError: a chat template is asked for and the tokenizer has none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise PromptsError("prompts.template is 'chat' and the model's tokenizer has no chat template: use 'plain'")
    return template != "plain" and bool(tokenizer.chat_template)


def tokenized(text: str, answer: str | None, tokenizer: PreTrainedTokenizerBase, template: Template) -> Prompt:
    """Give a text as the prompt that the model gets; errors as ``in_chat``."""
    if in_chat(tokenizer, template):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    prompt_id = hashlib.sha256(text.encode()).hexdigest()[:24]
    return Prompt(prompt_id, np.asarray(ids, dtype=np.int32), text, answer)


def unusable(prompt: Prompt, context_tokens: int, max_new_tokens: int) -> str | None:
    """Say why the model cannot answer a prompt, or None when it can."""
    if not prompt.text.strip() or len(prompt.tokens) == 0:
        return "empty prompt"
    if len(prompt.tokens) + max_new_tokens > context_tokens:
        return (
            f"prompt of {len(prompt.tokens)} tokens and a response of up to {max_new_tokens} do not fit the model's "
            f"context of {context_tokens}"
        )
    return None
