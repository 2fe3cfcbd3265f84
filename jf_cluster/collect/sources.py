"""Where prompts come from: rows of a data set or generated problems, in an order that the seed alone decides.

Texts are read in blocks for as long as somebody wants more, and again by their row numbers when they are decoded;
nobody holds all of them at once.
"""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from jf_cluster.config import Config
from jf_cluster.tiny.problems import Split, problem

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

TINY_SEED = 1_000_000
"""Generated training prompts come from streams of their own, not from the ones the shipped base was trained on."""

FIRST_BLOCK, LARGEST_BLOCK = 1 << 10, 1 << 18
"""Rows read at a time: few where few are wanted; Arrow gathers many at once far faster than one after the other."""

Rows = NDArray[np.integer]


class PromptsError(ValueError):
    """The prompts a configuration asks for cannot be had; the message says what is wrong and what to change."""


class Conversation(str):
    """Messages up to the last one of the user, as JSON: a list of objects with ``role`` and ``content``."""

    def messages(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self)
        return found


class Source(Protocol):
    """Texts by row number."""

    def blocks(self) -> Generator[tuple[Rows, list[str]]]:
        """Yield row numbers and texts, always in the same order."""

    def read(self, rows: Rows) -> list[tuple[str, str | None]]:
        """Give the texts of some rows with their reference answers, None where there are none."""


class Generated:
    """Problems of the embedded run, without end; the held-out ones are the same whatever the seed."""

    def __init__(self, seed: int, split: Split) -> None:
        self._split: Split = split
        self._stream = 0 if split == "heldout" else TINY_SEED + seed

    def blocks(self) -> Generator[tuple[Rows, list[str]]]:
        for start in itertools.count(0, FIRST_BLOCK):
            rows = np.arange(start, start + FIRST_BLOCK)
            yield rows, [text for text, _ in self.read(rows)]

    def read(self, rows: Rows) -> list[tuple[str, str | None]]:
        drawn = (problem(self._split, self._stream, row) for row in rows.tolist())
        return [(p.question, str(p.answer)) for p in drawn]


class DataSet:
    """Rows of a local file or a data set of the hub, shuffled.

    Raises:
        PromptsError: it cannot be read, has no rows or lacks a column.
    """

    def __init__(self, config: Config) -> None:
        settings = config.prompts
        data = read_dataset(settings.source, settings.subset, settings.split, "prompts.source")
        for name in filter(None, (settings.column, settings.answer_column)):
            if name not in data.column_names:
                raise PromptsError(
                    f"{settings.source} has no column {name!r}; it has {', '.join(data.column_names)}: "
                    "set prompts.column (and prompts.answer_column)"
                )
        if len(data) == 0:
            raise PromptsError(f"{settings.source} has no rows")
        self._settings, self._seed, self.count = settings, config.seed, len(data)
        self._columns = [settings.column] + ([settings.answer_column] if settings.answer_column else [])
        # Where the table's files are; each pass over it maps them anew, so that the pages it has read are given back.
        self._table = pickle.dumps(data.data.select(self._columns))
        self._open: pa.Table | None = None

    def blocks(self) -> Generator[tuple[Rows, list[str]]]:
        """As ``Source``; the order is that of ``datasets.Dataset.shuffle``.

        Rows without a text, or without a message of the user, are left out and counted in a warning.

        Raises:
            PromptsError: the column holds something else than texts and lists of messages.
        """
        table = pickle.loads(self._table)
        order = np.random.default_rng(self._seed).permutation(self.count)
        order = order.astype(np.int32 if self.count < 1 << 31 else np.int64, copy=False)
        start, size, without = 0, FIRST_BLOCK, 0
        try:
            while start < self.count:
                rows = order[start : start + size]
                texts = [_asked(value) for value in _taken(table.column(0), rows)]
                if None in texts:
                    rows = rows[[text is not None for text in texts]]
                    without += len(texts) - len(rows)
                    texts = [text for text in texts if text is not None]
                yield rows, self._checked(texts)
                start, size = start + size, min(2 * size, LARGEST_BLOCK)
        finally:
            if without:
                logger.warning(
                    "%d of the %d rows of %s looked at are left out: column %r has no text there, no message "
                    "of a user or no valid UTF-8",
                    *(without, min(start + size, self.count), self._settings.source, self._settings.column),
                )

    def read(self, rows: Rows) -> list[tuple[str, str | None]]:
        if self._open is None:
            self._open = pickle.loads(self._table)
        texts, *answers = (_taken(self._open.column(name), rows) for name in self._columns)
        known = map(_as_text, answers[0]) if answers else itertools.repeat(None)
        return list(zip(self._checked([_asked(value) for value in texts]), known, strict=False))

    def _checked(self, texts: list[object]) -> list[str]:
        for text in texts:
            if not isinstance(text, str):
                raise PromptsError(
                    f"column {self._settings.column!r} of {self._settings.source} holds {type(text).__name__}, neither "
                    "text nor messages with role and content"
                )
        return cast("list[str]", texts)


def _asked(value: object) -> object:
    """What is asked: a text as it is, of messages those up to the user's last one, None where there is none."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    messages = [{"role": message.get("role"), "content": message.get("content")} for message in value]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    whole = messages and all(isinstance(text, str) for message in messages for text in message.values())
    return Conversation(json.dumps(messages, ensure_ascii=False)) if whole else None


def _taken(column: pa.ChunkedArray, rows: Rows) -> list[object]:
    """Values of some rows, None where there is no valid one.

    Arrow's own ``take`` first copies a column that lies in several pieces as a whole.
    """
    order = np.argsort(rows, kind="stable")
    starts = np.cumsum([0, *map(len, column.chunks)])
    found: list[object] = [None] * len(rows)
    of_chunks = np.split(order, np.searchsorted(rows[order], starts[1:-1]))
    for chunk, start, places in zip(column.chunks, starts[:-1], of_chunks, strict=True):
        if len(places):
            values = _valid(chunk.take(pa.array(rows[places] - start)))
            for place, value in zip(places.tolist(), values, strict=True):
                found[place] = value
    return found


def _valid(values: pa.Array) -> list[object]:
    """Values as Python's, None for text that is no valid UTF-8: Arrow reads that from JSON and Parquet unseen."""
    try:
        return cast("list[object]", values.to_pylist())
    except UnicodeDecodeError:
        if len(values) == 1:
            return [None]
        half = len(values) // 2
        return _valid(values[:half]) + _valid(values[half:])


def source_of(config: Config, split: Split) -> Source:
    """Give the configured source; a data set's blocks hold texts of the other split too."""
    return Generated(config.seed, split) if config.prompts.source == "tiny" else DataSet(config)


def _as_text(answer: object) -> str | None:
    """A reference answer as text; a list, such as MBPP's tests, as JSON."""
    return json.dumps(answer) if isinstance(answer, list) else None if answer is None else str(answer)


def read_dataset(source: str, subset: str | None, split: str, setting: str) -> datasets.Dataset:
    """Read a local file, or a data set of the Hugging Face hub; ``setting`` is the one to name in messages.

    Raises:
        PromptsError: it cannot be read or has no rows.
    """
    # Here because every worker imports this module, and few read a data set.
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

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
    except (DatasetGenerationError, pa.ArrowException, ConnectionError, RuntimeError, ValueError) as error:
        if isinstance(error, PromptsError):
            raise
        reason = error.__cause__ or error
        raise PromptsError(
            f"{source} ({setting}) cannot be read: {reason}; it may be a .json, .jsonl or .parquet file in UTF-8 or a "
            "data set of the hub without a loading script"
        ) from error
