"""Answers that are one number: the embedded run's arithmetic and GSM8K."""

from __future__ import annotations

import re

from jf_cluster.tiny.problems import parse_answer

_MARKED = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def arithmetic_answer(text: str) -> str | None:
    """The number after the closing ``####`` of a generated problem's solution."""
    answer = parse_answer(text)
    return None if answer is None else str(answer)


def gsm8k_answer(text: str) -> str | None:
    """The number after the last ``####``, else the last number of the text; commas and ``.0`` do not count."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    return canonical(found[-1]) if found else None


def canonical(number: str) -> str:
    """A number without thousands separators and trailing zeros."""
    plain = number.replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
