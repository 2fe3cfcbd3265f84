"""Graders: is a response right? One module for each kind of answer, and here the choice between them.

Nothing here knows of prompts, models or rounds, so collecting uses the same graders as evaluating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jf_cluster.config import Grader, SandboxConfig
from jf_cluster.evaluate.graders import code, mathematics
from jf_cluster.evaluate.graders.exact import arithmetic_answer, canonical, gsm8k_answer

_EXTRACT: dict[Grader, Callable[[str], str | None]] = {
    "none": str.strip,
    "arithmetic": arithmetic_answer,
    "gsm8k": gsm8k_answer,
    "math": mathematics.boxed,
    "code": lambda text: code.code_of(text).strip(),
}

Pair = tuple[str, str | None]
"""A response and the reference it is judged by."""


def extract(grader: Grader, text: str) -> str | None:
    """Read the final answer of a response, for comparing responses; without a grader it is the whole response."""
    return _EXTRACT[grader](text)


def is_right(grader: Grader, response: str, reference: str | None, limits: SandboxConfig | None = None) -> bool:
    """Whether a response is right.

    Args:
        reference: ``arithmetic``, ``gsm8k``: a number or a worked solution, read like a response; ``math``: an
            expression or a solution with a boxed one; ``code``: tests, see ``CodeReference``.
        limits: what code may use.

    Raises:
        ValueError: the grader is ``none`` or there is no reference to judge by.
        SandboxError: code cannot be confined on this system.
    """
    if grader == "none" or reference is None:
        raise ValueError("a grader and reference answers are needed (prompts.grader, prompts.answer_column)")
    if grader == "code":
        return code.is_right(response, reference, limits or SandboxConfig())
    if grader == "math":
        return mathematics.is_same(response, reference)
    expected = extract(grader, reference) or canonical(reference.strip())
    return extract(grader, response) == expected


def grade(grader: Grader, pairs: Sequence[Pair], limits: SandboxConfig, threads: int = 1) -> list[bool | None]:
    """Whether each response is right, None without a reference; the same response to the same one is judged once.

    Errors otherwise as ``is_right``. Code runs in ``threads`` sandboxes at a time.
    """
    different = list(dict.fromkeys(pair for pair in pairs if pair[1] is not None))

    def judged(pair: Pair) -> bool:
        return is_right(grader, *pair, limits)

    if grader == "code" and threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            verdicts = dict(zip(different, pool.map(judged, different), strict=True))
    else:
        verdicts = {pair: judged(pair) for pair in different}
    return [verdicts.get(pair) for pair in pairs]
