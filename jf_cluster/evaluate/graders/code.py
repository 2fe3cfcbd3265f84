"""Answers that are Python code: taken out of a response, put together with tests, and run in the sandbox."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from dataclasses import asdict, dataclass

from jf_cluster.config import SandboxConfig
from jf_cluster.evaluate.graders import sandbox

_FENCED = re.compile(
    r"(?:^(?P<indent>[ \t]*)(?P<fence>```|~~~)(?P<language>[^\n`]*)|```[ \t]*(?:python3?|py)?[ \t]*)\n"
    r"(?P<code>.*?)(?:\n?^(?(fence)(?P=indent)?(?P=fence)|```)|\Z)",
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
"""A block, with its language where its fence begins a line. Blocks of other languages are found too: otherwise their
end would be taken for a beginning. One in a list ends as far in as it begins: fences further in are of a docstring."""
_LANGUAGES = ("", "python", "python3", "py")
_INDENTED = re.compile(r"(?:[ \t]*\n)*(?: {2}|\t)[ \t]*\S")
"""More than the space that a SentencePiece tokenizer's first word may begin with: the inside of a function."""
_FUNCTION = re.compile(r"^(?:async )?def \w+\(", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import .*\n", re.MULTILINE)
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
    before, fence, behind = response.partition("```")
    if fence and (_INDENTED.match(before) or _FUNCTION.search(before)) and not behind.partition("\n")[0].strip():
        return before  # a model that continues a text closes a block that it never opened
    blocks = [
        textwrap.dedent(found["code"]) if found["indent"] else found["code"]
        for found in _FENCED.finditer(response)
        if ((found["language"] or "").lower().split() or [""])[0] in _LANGUAGES
    ]
    defining = [block for block in blocks if _defines(block, entry_point)]
    return (defining or blocks or [response])[0]


def program(response: str, reference: CodeReference) -> str:
    """The program that passes exactly when the response is right."""
    code = code_of(response, reference.entry_point)
    whole = code.lstrip()  # A SentencePiece tokenizer's first word behind a chat template begins with a space.
    if not reference.prompt:
        code = whole
    elif not _defines(whole, reference.entry_point) or (
        # A model that continues the function goes on, often with the same function once more.
        _INDENTED.match(code) and not _defines(whole.partition("\n")[0], reference.entry_point)
    ):
        code = reference.prompt + _AFTER_FUNCTION.split(code)[0]
    elif _is_complete(reference.prompt):
        # For its imports and helpers; the function that is only documented in it is defined anew behind it.
        # What it imports from __future__ has to come first of all.
        code = "".join(_FUTURE.findall(whole)) + f"{reference.prompt}\n{_FUTURE.sub('', whole)}"
    else:
        code = whole
    # What a solution does as a script (reading input, unittest.main, which exits) is no part of it: as in HumanEval's
    # own harness it is not the main module. Tests may be.
    return f'{code}\n\n__name__ = "__main__"\n{reference.tests}\n'


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
