"""Answers that are one number: the embedded run's arithmetic and GSM8K."""

from __future__ import annotations

import re

from jf_cluster.tiny.problems import parse_answer

_CURRENCY = re.compile(r"\\?\$")
"""Taken out first: it stands between a sign and its number, and in Markdown with a backslash."""
_MARKED = re.compile(r"####[\s*]*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")
_MINUS = "\N{MINUS SIGN}"


def arithmetic_answer(text: str) -> str | None:
    """The number after the closing ``####`` of a generated problem's solution."""
    answer = parse_answer(text)
    return None if answer is None else str(answer)


def gsm8k_answer(text: str) -> str | None:
    """The number after the last ``####``, else the last number of the text; commas and ``.0`` do not count."""
    plain = _CURRENCY.sub("", text).replace(_MINUS, "-")
    found = _MARKED.findall(plain) or _NUMBER.findall(plain)
    return canonical(found[-1]) if found else None


def canonical(number: str) -> str:
    """A number without thousands separators and trailing zeros, with a digit before its point."""
    plain = re.sub(r"^(-?)\.", r"\g<1>0.", number.replace(",", ""))
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
