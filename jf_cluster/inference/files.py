"""``python -m jf_cluster generate``: prompts from a file, responses into a file, batch by batch.

Input is a text file with one prompt a line, or JSONL whose rows hold ``messages`` (a conversation) or a column with the
prompt; other fields are carried over, save those of an earlier answer. Output is JSONL in the input's order. The file
appears whole when all is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from jf_cluster.config import ConfigError
from jf_cluster.inference.loaded import Loaded, Settings
from jf_cluster.jacobi.decoding import Generation, PromptError, check_prompt, generate
from jf_cluster.jacobi.sampling import prompt_key
from jf_cluster.jacobi.text import TextStream

ANSWER = ("response", "finish_reason", "tokens", "forwards", "tokens_per_forward", "error")
"""Fields of an output row that are not the input's."""


@dataclass(frozen=True)
class Task:
    """One line of the input: its fields, and its prompt as token ids."""

    line: int
    fields: dict[str, Any]
    ids: list[int]


def read_tasks(path: Path, loaded: Loaded, column: str, template: bool) -> list[Task]:
    """Read every prompt of a file.

    Raises:
        ConfigError: no such file, a line that is not JSON or has no prompt; the message names the line.
    """
    try:
        # `splitlines` would also split at characters that a text or JSON may hold, such as U+2028.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts cannot be read from {path}: {error}") from error
    parse = _json_fields if path.suffix in (".jsonl", ".json") else _text_fields
    tasks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = parse(line, f"{path}, line {number}")
            tasks.append(Task(number, fields, _ids(fields, loaded, column, template, f"{path}, line {number}")))
    if not tasks:
        raise ConfigError(f"{path} has no prompts")
    return tasks


def _text_fields(line: str, _: str) -> dict[str, Any]:
    return {"prompt": line}


def _json_fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: a JSON object is needed, not {type(fields).__name__}")
    return fields


def _ids(fields: dict[str, Any], loaded: Loaded, column: str, template: bool, where: str) -> list[int]:
    messages, prompt = fields.get("messages"), fields.get(column, fields.get("prompt"))
    try:
        if messages is not None:
            return loaded.chat([{"role": m["role"], "content": m["content"]} for m in messages])
        if not isinstance(prompt, str):
            raise ConfigError(f"{where}: neither messages nor a text in {column!r}")
        return loaded.chat([{"role": "user", "content": prompt}]) if template else loaded.plain(prompt)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where}: messages must be a list of objects with role and content") from error
    except TemplateError as error:
        raise ConfigError(f"{where}: the model's chat template refuses it: {error}") from error


def respond(
    loaded: Loaded, tasks: Sequence[Task], settings: Settings, batch: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give (index of the task, output row) as batches are done; a prompt that does not fit gets ``error`` instead."""
    fitting = []
    carried = [{name: value for name, value in task.fields.items() if name not in ANSWER} for task in tasks]
    for index, task in enumerate(tasks):
        try:
            check_prompt(loaded.model, task.ids, settings.max_new_tokens)
            fitting.append(index)
        except PromptError as error:
            yield index, carried[index] | {"error": str(error)}
    fitting.sort(key=lambda i: len(tasks[i].ids))  # alike lengths together: less padding
    for at in range(0, len(fitting), batch):
        chosen = fitting[at : at + batch]
        made = generate(
            loaded.model,
            [tasks[i].ids for i in chosen],
            max_new_tokens=settings.max_new_tokens,
            end_ids=loaded.end_ids,
            drafting=settings.drafting,
            sampling=settings.sampling,
            keys=[prompt_key(settings.seed, 0, str(tasks[i].line)) for i in chosen],  # whatever batch it is in
            stop=settings.stop,
            decode=loaded.decode,
        )
        for index, generation in zip(chosen, made, strict=True):
            yield index, carried[index] | _result(loaded, settings, tasks[index].ids, generation)


def _result(loaded: Loaded, settings: Settings, prompt: list[int], made: Generation) -> dict[str, Any]:
    text = TextStream(loaded.decode, settings.stop, prompt)
    return {
        "response": text.feed(made.tokens) + text.finish(),
        "finish_reason": made.reason,
        "tokens": len(made.tokens),
        "forwards": made.forwards,
        "tokens_per_forward": round(made.tpf, 3),
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSONL in one atomic step."""
    draft = path.with_name(path.name + ".partial")
    with draft.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    draft.replace(path)
