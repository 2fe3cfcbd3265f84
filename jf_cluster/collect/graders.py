"""Graders: is a response's final answer the right one?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from jf_cluster.tiny.problems import parse_answer

Grader = Literal["none", "arithmetic", "gsm8k"]

_MARKED = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def arithmetic_answer(text: str) -> str | None:
    """The number after the closing ``####`` of a generated problem's solution."""
    answer = parse_answer(text)
    return None if answer is None else str(answer)


def gsm8k_answer(text: str) -> str | None:
    """The number after the last ``####``, else the last number of the text; commas and ``.0`` do not count."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    return _canonical(found[-1]) if found else None


def _canonical(number: str) -> str:
    plain = number.replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


_EXTRACT: dict[Grader, Callable[[str], str | None]] = {"arithmetic": arithmetic_answer, "gsm8k": gsm8k_answer}


def extract(grader: Grader, text: str) -> str | None:
    """Read the final answer of a response; without a grader the answer is the whole response."""
    return text.strip() if grader == "none" else _EXTRACT[grader](text)


def is_right(grader: Grader, response: str, reference: str | None) -> bool:
    """Whether a response's final answer is the reference's.

    The reference is a bare number or a worked solution; what it says is read like a response.

    Raises:
        ValueError: the grader is ``none`` or there is no reference to judge by.
    """
    if grader == "none" or reference is None:
        raise ValueError("a grader and reference answers are needed (prompts.grader, prompts.answer_column)")
    expected = extract(grader, reference) or _canonical(reference.strip())
    answer = extract(grader, response)
    return answer is not None and answer == expected
