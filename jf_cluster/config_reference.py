"""Every key of the configuration as a page of documentation, made from the same schema that checks the values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from typing import Any

from jf_cluster.config import Config

_HEAD = """# Configuration

Every key there is. Made from the schema by `python -m jf_cluster config --reference`; a test keeps this page and the
code together. A configuration is one YAML file; keys that are left out have the value given here. Overrides are put on
top with dots: `make train SET="train.steps=100 name=short"`, `ray job submit -- python jobs/train.py train.steps=100`.
An unknown key is an error that names it. `python -m jf_cluster config --config FILE` prints a file with everything it
leaves out.
"""

_WITHIN_A_RUN = """## What may change within a run

A run keeps the settings it was begun with (`runs/<name>/config.yaml`), since its rounds build on each other. These say
how the work is carried out, not what comes out of it, and may change whenever its command is typed again; a section
stands for all its keys:

{keys}.

Any other change is refused with the keys that differ: give it another `name`, which is a new run. `train.workers` has
to divide `train.micro_batches_per_step`, which may not change: choose a number with many divisors. A new run may begin
where another one ended: `model.path=runs/mine/models/round-002`, which is then its base.
"""

Schema = dict[str, Any]


def reference() -> str:
    """The page, in Markdown."""
    whole = Config.model_json_schema()
    sections = whole["$defs"]
    parts = [_HEAD]
    for name, section in _sections(whole, sections, ""):
        parts += [f"## {name or 'Top level'}\n"]
        if text := section.get("description"):
            parts += [_line(text) + "\n"]
        parts += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in section["properties"].items():
            if _target(field) is None:
                parts.append(
                    f"| `{key}` | {_values(field)} | {_default(field)} | {_line(field.get('description', ''))} |"
                )
        parts.append("")
    # Late: with Ray and torch behind it, it takes seconds to import.
    from jf_cluster.rounds import OPERATIONAL

    keys = ", ".join(f"`{key}`" for key in _ordered(OPERATIONAL, whole, sections))
    return "\n".join([*parts, _WITHIN_A_RUN.format(keys=keys)])


def _ordered(chosen: Set[str], whole: Schema, sections: dict[str, Schema]) -> list[str]:
    """Chosen keys and sections in the page's order."""
    every = [
        f"{name}.{key}".removeprefix(".")
        for name, section in _sections(whole, sections, "")
        for key in section["properties"]
    ]
    assert chosen <= set(every), f"no such settings: {chosen - set(every)}"
    return [key for key in every if key in chosen]


def _sections(section: Schema, known: dict[str, Schema], prefix: str) -> Iterator[tuple[str, Schema]]:
    yield prefix, section
    for key, field in section["properties"].items():
        if (target := _target(field)) is not None:
            yield from _sections(known[target], known, f"{prefix}.{key}" if prefix else key)


def _target(field: Schema) -> str | None:
    """Name of the section a field is, None for a plain value."""
    options = [field, *field.get("anyOf", [])]
    return next((str(o["$ref"]).rsplit("/", 1)[1] for o in options if "$ref" in o), None)


def _values(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(option) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        items = field.get("prefixItems") or [field.get("items", {})]
        return "list of " + _values(items[0])
    bounds = [
        f"{sign} {field[name]:g}"
        for name, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if name in field
    ]
    kinds = {"string": "text", "boolean": "true, false", "null": "null", "integer": "integer", "number": "number"}
    return " ".join([kinds[field["type"]], *bounds]).replace("|", "\\|")


def _default(field: Schema) -> str:
    value = field.get("default")
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")
