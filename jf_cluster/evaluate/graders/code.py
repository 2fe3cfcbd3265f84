"""Answers that are Python code: taken out of a response, put together with tests, and run in the sandbox."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict, dataclass

from jf_cluster.config import SandboxConfig
from jf_cluster.evaluate.graders import sandbox

_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_AFTER_FUNCTION = re.compile(r"\n(?:class |def |#|if |print|@|assert |```)")
"""Where a completion leaves the function it was to complete; the stop sequences of the HumanEval paper and a few."""


@dataclass(frozen=True)
class CodeReference:
    """What a response is judged by; kept as JSON where a reference is text."""

    tests: str
    """Python code that raises where the answer is wrong; run behind it."""
    prompt: str = ""
    """Code that a response without a function of its own continues."""
    entry_point: str = ""
    """Function that the tests call."""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> CodeReference:
        """Read what ``to_text`` wrote, a JSON list of statements (``assert f(1) == 2``), or plain test code."""
        try:
            found = json.loads(text)
        except ValueError:
            return cls(text)
        if isinstance(found, dict):
            return cls(**found)
        return cls("\n".join(map(str, found)) if isinstance(found, list) else text)


def code_of(response: str, entry_point: str = "") -> str:
    """The code of a response: its fenced block (the one that defines ``entry_point`` before others), or all of it."""
    blocks: list[str] = _FENCED.findall(response)
    defining = [block for block in blocks if _defines(block, entry_point)]
    return (defining or blocks or [response])[0]


def program(response: str, reference: CodeReference) -> str:
    """The program that passes exactly when the response is right."""
    code = code_of(response, reference.entry_point)
    whole = code.lstrip()  # A SentencePiece tokenizer's first word behind a chat template begins with a space.
    if not reference.prompt:
        code = whole
    elif not _defines(whole, reference.entry_point):
        code = reference.prompt + _AFTER_FUNCTION.split(code)[0]
    elif _is_complete(reference.prompt):
        # For its imports and helpers; the function that is only documented in it is defined anew behind it.
        code = f"{reference.prompt}\n{whole}"
    else:
        code = whole
    return f"{code}\n\n{reference.tests}\n"


def is_right(response: str, reference: str, limits: SandboxConfig) -> bool:
    """Whether the response's code passes the tests.

    Raises:
        SandboxError: code cannot be confined on this system.
    """
    return sandbox.run(program(response, CodeReference.from_text(reference)), limits).passed


def _is_complete(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _defines(code: str, name: str) -> bool:
    return bool(name) and re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None
