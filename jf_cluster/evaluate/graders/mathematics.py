r"""Answers that are mathematical expressions, as in MATH: the last ``\boxed{…}`` of a response, compared by meaning.

Reading LaTeX and deciding that two expressions are equal is the work of the ``math-verify`` library.
"""

from __future__ import annotations

import logging
import threading

BOXED = r"\boxed{"
SECONDS = 5
"""What one expression may take: ``9^{9^{9^9}}`` never ends."""


def boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{…}``, braces within it balanced; None where there is none."""
    start = text.rfind(BOXED)
    while start >= 0:
        depth, begin = 1, start + len(BOXED)
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[begin:at].strip()
        start = text.rfind(BOXED, 0, start)
    return None


def is_same(response: str, reference: str) -> bool:
    """Whether a response's final expression equals the reference's: a solution with a boxed answer, or a bare one."""
    # Imported where it is used: with sympy it takes a second, and only MATH needs it.
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # what cannot be read is wrong, not news
    # Its time limit is an alarm signal, which Python delivers to the main thread only.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, answer = boxed(reference) or reference.strip(), boxed(response)
    expected = parse(f"{BOXED}{gold}}}", parsing_timeout=seconds)
    # Given all of a response, the library would take several boxes for one answer with several parts.
    found = parse(response if answer is None else f"{BOXED}{answer}}}", parsing_timeout=seconds)
    return bool(verify(expected, found, timeout_seconds=seconds))
