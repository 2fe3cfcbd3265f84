"""Prompts: told apart into training and held-out ones, given to rounds, tokenized when they are decoded.

A text is held out exactly when its SHA-256 digest says so (one of 16), so training and held-out prompts never overlap
whatever the order of the data set, and each round of ``fresh`` prompts has a slice of its own. A round may have tens
of millions: what is kept of each is its row number, 12 bytes of its digest and its length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from jf_cluster.collect.sources import Conversation, DataSet, PromptsError, Rows, Source, source_of
from jf_cluster.config import Config, PromptsConfig, Template
from jf_cluster.tiny.problems import HELD_OUT_BYTES, Split
from jf_cluster.whole_files import write_whole

ID_BYTES = 12
"""Leading bytes of a text's digest that are its prompt's id, in hexadecimal."""

_HEXADECIMAL = np.frombuffer(b"0123456789abcdef", np.uint8)
_AS_NUMBERS = ((slice(0, 8), ">u8"), (slice(8, ID_BYTES), ">u4"))


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model is given it.

    ``prompt_id`` is a digest of the text, so one text is one prompt wherever it stands in the data; ``tokens`` int32
    [P], the chat template included; ``answer`` is the reference answer where the source has one; ``refused`` is why the
    chat template does not take it.
    """

    prompt_id: str
    tokens: np.ndarray
    text: str
    answer: str | None
    refused: str | None = None


@dataclass(frozen=True)
class Listing:
    """Distinct texts of a split in their order: row numbers [N], digests uint8 [N, 12], characters int32 [N]."""

    rows: Rows
    digests: NDArray[np.uint8]
    characters: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | NDArray[np.generic]) -> Listing:
        return Listing(self.rows[chosen], self.digests[chosen], self.characters[chosen])


class Prompts(Sequence[Prompt]):
    """The prompts of a round, read and tokenized one by one when they are asked for."""

    def __init__(self, source: Source, listing: Listing, tokenizer: PreTrainedTokenizerBase, template: Template):
        self._source, self._listing, self._tokenizer, self._template = source, listing, tokenizer, template

    def __len__(self) -> int:
        return len(self._listing)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        places = range(len(self))[place]
        return self.take(places) if isinstance(places, range) else self.take([places])[0]

    @property
    def characters(self) -> NDArray[np.int32]:
        """Length of each prompt's text, int32 [N]."""
        return self._listing.characters

    def ids(self, begin: int = 0, end: int | None = None) -> pa.StringArray:
        """Prompt ids of the prompts at places from ``begin`` to before ``end``; 28 bytes each."""
        digests = self._listing.digests[begin:end]
        ends = np.arange(len(digests) + 1, dtype=np.int32) * np.int32(2 * ID_BYTES)
        text = np.empty((len(digests), 2 * ID_BYTES), np.uint8)
        text[:, ::2], text[:, 1::2] = _HEXADECIMAL[digests >> 4], _HEXADECIMAL[digests & 15]
        return pa.StringArray.from_buffers(len(digests), pa.py_buffer(ends), pa.py_buffer(text))

    def by_id(self) -> Rows:
        """Places of all prompts, sorted by their ids."""
        digests = self._listing.digests
        leading, rest = (digests[:, part].copy().view(kind).reshape(-1) for part, kind in _AS_NUMBERS)
        return np.lexsort((rest, leading))

    def take(self, places: Sequence[int] | Rows) -> list[Prompt]:
        """Give the prompts at some places."""
        read = self._source.read(self._listing.rows[np.asarray(places, np.int64)])
        return [tokenized(text, answer, self._tokenizer, self._template) for text, answer in read]


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, round_number: int) -> Prompts:
    """Give the training prompts of a round, ``prompts.per_round`` of them.

    Raises:
        PromptsError: the source cannot be read, lacks the column, or has too few training prompts.
    """
    settings = config.prompts
    skipped = (round_number - 1) * settings.per_round if settings.fresh else 0
    last = skipped + settings.per_round
    source = source_of(config, "train")
    found = listings(source, {"train": last})["train"]
    if len(found) < last:
        raise _too_few(settings, round_number, len(found))
    return Prompts(source, found[skipped:last], tokenizer, settings.template)


def _too_few(settings: PromptsConfig, round_number: int, there: int) -> PromptsError:
    needed = settings.per_round * (round_number if settings.fresh else 1)
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
    needed: dict[Split, int] = {
        "train": settings.per_round * (last_round if settings.fresh else 1),
        "heldout": settings.held_out,
    }
    found = {split: len(listing) for split, listing in listings(source_of(config, "train"), needed).items()}
    if found["train"] < needed["train"]:
        raise _too_few(settings, last_round, found["train"])
    if found["heldout"] < needed["heldout"]:
        raise _too_few_held_out(settings, found["heldout"])


def pin(config: Config) -> None:
    """Note what the prompts' source holds when a run begins; another one later would share prompts between rounds.

    Noted are the number of rows, which decides their order, and a digest of the first texts in that order.

    Raises:
        PromptsError: it holds something else than when the run was begun, or cannot be read.
    """
    if config.prompts.source == "tiny":
        return
    source = DataSet(config)
    with closing(source.blocks()) as blocks:
        _, texts = next(blocks)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    now = {"source": config.prompts.source, "rows": source.count, "first_texts": digest}
    path = config.run_dir / "prompts.json"
    before = json.loads(path.read_text()) if path.is_file() else now
    if before["rows"] != now["rows"] or before["first_texts"] != now["first_texts"]:
        rows = f"{before['rows']} rows" if before["rows"] != now["rows"] else "other texts"
        raise PromptsError(
            f"{config.prompts.source} has changed: it had {rows} when the run in {config.run_dir} was begun, and has "
            f"{now['rows']} rows now. Its rounds would share prompts: put it back, or start another run (name=other)"
        )
    write_whole(path, json.dumps(now, indent=1) + "\n")


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Give the first ``prompts.held_out`` prompts that are kept aside for evaluation.

    Raises:
        PromptsError: the source cannot be read, lacks the column, or has too few held-out prompts.
    """
    settings = config.prompts
    source = source_of(config, "heldout")
    found = listings(source, {"heldout": settings.held_out})["heldout"]
    if len(found) < settings.held_out:
        raise _too_few_held_out(settings, len(found))
    return Prompts(source, found, tokenizer, settings.template)[: settings.held_out]


def _too_few_held_out(settings: PromptsConfig, there: int) -> PromptsError:
    return PromptsError(
        f"{there} texts of {settings.source} are held out (one of 16, by a digest of the text) and prompts.held_out "
        f"asks for {settings.held_out}: lower it or use a larger data set"
    )


def listings(source: Source, wanted: Mapping[Split, int]) -> dict[Split, Listing]:
    """List distinct texts until there are enough of every split that is wanted, or no more."""
    none = Listing(np.zeros(0, np.int32), np.zeros((0, ID_BYTES), np.uint8), np.zeros(0, np.int32))
    parts = {split: [none] for split in wanted}
    with closing(source.blocks()) as blocks:
        for rows, texts in blocks:
            digests = b"".join([hashlib.sha256(text.encode()).digest()[:ID_BYTES] for text in texts])
            lengths = np.fromiter(map(len, texts), np.int32, len(texts))
            block = Listing(rows, np.frombuffer(digests, np.uint8).reshape(-1, ID_BYTES), lengths)
            held_out = block.digests[:, 0] < HELD_OUT_BYTES
            for split in wanted:
                parts[split].append(block[held_out if split == "heldout" else ~held_out])
            if all(_has(parts[split], count) for split, count in wanted.items()):
                break
    return {split: _distinct(parts[split])[: wanted[split]] for split in wanted}


def _has(parts: list[Listing], count: int) -> bool:
    """Whether the parts have so many distinct texts; puts them together where that has to be looked at."""
    if sum(map(len, parts)) >= count:
        parts[:] = [_distinct(parts)]
    return len(parts[0]) >= count


def _distinct(parts: list[Listing]) -> Listing:
    """All parts together, of texts that come again only the first; empties ``parts``."""
    if len(parts) == 1:
        return parts[0]
    # One after the other, so that not everything is there twice.
    fields = [(p.rows, p.digests, p.characters) for p in parts]
    parts.clear()
    columns = [list(column) for column in zip(*fields, strict=True)]
    del fields
    rows, digests, characters = (np.concatenate(columns.pop(0)) for _ in range(3))
    listing = Listing(rows, digests, characters)
    again = [_again(digests, np.flatnonzero(digests[:, -1] == last)) for last in range(256)]
    places = np.concatenate(again)
    if not len(places):
        return listing
    kept = np.ones(len(rows), bool)
    kept[places] = False
    return listing[kept]


def _again(digests: NDArray[np.uint8], places: Rows) -> Rows:
    """Those of some places, in ascending order, that have the digest of an earlier one of them."""
    leading = digests[places, :8].view(np.uint64).reshape(-1)
    sorted_ = np.sort(leading)
    if not (sorted_[1:] == sorted_[:-1]).any():  # sorting whole digests takes ten times as long
        return places[:0]
    _, first = np.unique(digests[places].view(f"S{ID_BYTES}").reshape(-1), return_index=True)
    return np.delete(places, first)


def in_chat(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether prompts are messages of a conversation rather than text to be continued.

    Raises:
        PromptsError: a chat template is asked for and the tokenizer has none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise PromptsError("prompts.template is 'chat' and the model's tokenizer has no chat template: use 'plain'")
    return template != "plain" and bool(tokenizer.chat_template)


def tokenized(text: str, answer: str | None, tokenizer: PreTrainedTokenizerBase, template: Template) -> Prompt:
    """Give a text, or a conversation, as the prompt that the model gets.

    Raises:
        PromptsError: as ``in_chat``; a conversation for a model that is not prompted in a chat template.
    """
    ids, refused = [], None
    if in_chat(tokenizer, template):
        messages = text.messages() if isinstance(text, Conversation) else [{"role": "user", "content": text}]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except TemplateError as error:  # roles it does not know, or their order
            refused = f"the model's chat template refuses it: {error}"
    elif isinstance(text, Conversation):
        raise PromptsError(
            "prompts.column holds messages, which need a tokenizer with a chat template and template=chat"
        )
    else:
        ids = tokenizer(text)["input_ids"]
    prompt_id = hashlib.sha256(text.encode()).digest()[:ID_BYTES].hex()
    return Prompt(prompt_id, np.asarray(ids, dtype=np.int32), text, answer, refused)


def unusable(prompt: Prompt, context_tokens: int, max_new_tokens: int) -> str | None:
    """Say why the model cannot answer a prompt, or None when it can."""
    if prompt.refused is not None:
        return prompt.refused
    if not prompt.text.strip() or len(prompt.tokens) == 0:
        return "empty prompt"
    if len(prompt.tokens) + max_new_tokens > context_tokens:
        return (
            f"prompt of {len(prompt.tokens)} tokens and a response of up to {max_new_tokens} do not fit the model's "
            f"context of {context_tokens}"
        )
    return None
