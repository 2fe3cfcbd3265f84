"""Graders: exact numbers, expressions by meaning, and code by running it."""

from __future__ import annotations

import gzip
import json
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jf_cluster.config import Grader, SandboxConfig
from jf_cluster.evaluate.graders import extract, grade, is_right, mathematics
from jf_cluster.evaluate.graders.code import CodeReference, code_of
from jf_cluster.evaluate.tasks import BENCHMARKS

LIMITS = SandboxConfig(seconds=30)


@pytest.mark.parametrize(
    ("grader", "response", "reference", "right"),
    [
        ("arithmetic", "so it is.\n#### 12", "12", True),
        ("arithmetic", "so it is.\n#### 12 apples", "12", False),
        ("arithmetic", "#### 1\n#### 12", "12", True),
        ("arithmetic", "it is 12", "12", False),
        ("gsm8k", "Natalia sold 72.\n#### 1,072", "step\n#### 1072", True),
        ("gsm8k", "The answer is $72.00.", "#### 72", True),
        ("gsm8k", "#### $72", "#### 72", True),
        ("gsm8k", r"#### \$72 for 3 of them", "#### 72", True),
        ("gsm8k", "#### **72** (of 80)", "#### 72", True),
        ("gsm8k", "#### -$72", "#### 72", False),
        ("gsm8k", "He owes it: -$72", "#### -72", True),
        ("gsm8k", "x = 80-72", "#### 72", True),
        ("gsm8k", "x = -72", "#### -72", True),
        ("gsm8k", "#### 72.50", "#### 72.5", True),
        ("gsm8k", "#### -3", "#### 3", False),
        ("gsm8k", "#### \N{MINUS SIGN}3", "#### -3", True),
        ("gsm8k", "it is \N{MINUS SIGN}3.", "#### 3", False),
        ("gsm8k", "a probability of .50", "#### 0.5", True),
        ("gsm8k", "#### -.5", "#### -0.50", True),
        ("gsm8k", "step 2.5 of them", "#### 5", False),
        ("gsm8k", "none", "#### 3", False),
        ("math", r"so \boxed{\frac{1}{2}}", r"we get $\boxed{0.5}$.", True),
        ("math", r"first \boxed{3}, then \boxed{x^2+2x+1}", r"(x+1)^2", True),
        ("math", r"$\boxed{\left\{1, 2\right\}}$", r"\{2, 1\}", True),
        ("math", r"\boxed{\text{(B)}}", r"\text{(B)}", True),
        ("math", r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
        ("math", r"\boxed{3}", r"4", False),
        ("math", "no idea", r"4", False),
        ("code", "```python\ndef f(x):\n    return x + 1\n```", "assert f(1) == 2", True),
        ("code", "Here:\n```\ndef f(x):\n    return x\n```\nDone.", '["assert f(1) == 2", "assert f(1) > 0"]', False),
        ("code", "import sys\ndef f(x): sys.exit(0)", "assert f(1) == 2", False),
    ],
)
def test_graders(grader: Grader, response: str, reference: str, right: bool) -> None:
    assert is_right(grader, response, reference, LIMITS) is right


def test_an_expression_that_never_ends_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "SECONDS", 1)
    assert not is_right("math", r"\boxed{9^{9^{9^9}}}", "4")


def test_answers_are_read_for_comparison() -> None:
    assert extract("none", " a b\n") == "a b"
    assert extract("math", r"\boxed{1} or \boxed{\frac{a}{b}}") == r"\frac{a}{b}"
    assert extract("math", r"\boxed{1} or \boxed{2") == "1" and extract("math", "2") is None
    assert extract("code", "so\n```python\nx = 1\n```") == "x = 1"


def test_without_a_grader_or_reference_nothing_is_right_or_wrong() -> None:
    for grader, reference in (("none", "a"), ("gsm8k", None)):
        with pytest.raises(ValueError, match="grader"):
            is_right(grader, "a", reference)  # type: ignore[arg-type]


def test_the_block_that_defines_the_function_is_the_code() -> None:
    text = "```python\nprint(1)\n```\nand\n```python\ndef f():\n    return 2\n```"
    assert code_of(text, "f").startswith("def f") and code_of(text) == "print(1)"
    assert code_of("```python\ndef f(): ...") == "def f(): ..."
    assert code_of("Use ```f```:\n```Python\nx = 1\n```\nGives\n```text\n1\n```") == "x = 1"


BLOCK = "```python\ndef f(x):\n    return x + 1\n```\n"


@pytest.mark.parametrize(
    "response",
    [
        f"Install it:\n```bash\npip install it\n```\nThen:\n\n{BLOCK}Done.\n",
        f"```bash\npip install it\n```\n{BLOCK}",
        f"{BLOCK}It gives\n```\n2\n```\n",
        "def f(x):\n    return x + 1\n```\n",
        "def f(x):\n    return x + 1\n```\n\nThis adds one.\n",
        f"def f(x) it is:\n{BLOCK}",
        BLOCK.replace("\n", "\r\n"),
        BLOCK.replace("```", "~~~"),
        f" {BLOCK}Done.\n",
        f"1. So:\n\n{textwrap.indent(BLOCK, '   ')}\n2. Done.\n",
        BLOCK.replace("    return", '    """Add.\n\n    ```\n    f(1)\n    ```\n    """\n    return'),
        "def f(x):\n    return x + 1\n\nif __name__ == '__main__':\n    print(f(int(input())))\n",
        "import unittest\ndef f(x):\n    return x + 1\nif __name__ == '__main__':\n    unittest.main()\n",
    ],
)
def test_what_stands_beside_the_code_makes_it_neither_wrong_nor_right(response: str) -> None:
    tests = "if __name__ == '__main__':\n    assert f(1) == 2"
    assert is_right("code", response, tests, LIMITS)
    assert not is_right("code", response.replace("x + 1", "x"), tests, LIMITS)


REFERENCE = CodeReference(
    "def check(candidate):\n    assert candidate([1, 2]) == 1.5 and candidate([4]) == 4\n\ncheck(mean)",
    'from math import fsum\n\n\ndef mean(numbers):\n    """Give the mean."""\n',
    "mean",
).to_text()


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("    return fsum(numbers) / len(numbers)\n", True),
        ("    return fsum(numbers) / len(numbers)\n\n\ndef other(:\nthis goes on and on", True),
        ("```python\ndef mean(numbers):\n    return fsum(numbers) / len(numbers)\n```", True),
        ("Sure.\n```python\n    return fsum(numbers) / len(numbers)\n```\nIt sums.", True),
        ("    return fsum(numbers) / len(numbers)\n```\n\nIt sums.\n", True),
        ("    return fsum(numbers) / len(numbers)\n\n\ndef mean(numbers):\n    return 0\n", True),
        ("    def mean(numbers):\n        return fsum(numbers) / len(numbers)\n", True),
        ("from __future__ import annotations\n\ndef mean(numbers):\n    return fsum(numbers) / len(numbers)\n", True),
        ("    return 1.5\n", False),
        ("    pass\n", False),
        ("", False),
        ("    raise SystemExit\n", False),
        ("    import os; os.kill(os.getppid(), 9)\n    return fsum(numbers) / len(numbers)\n", False),
    ],
)
def test_a_completion_is_the_prompts_function_or_a_whole_one(response: str, right: bool) -> None:
    assert is_right("code", response, REFERENCE, LIMITS) is right


def test_all_responses_are_judged_in_order_and_equal_ones_once() -> None:
    pairs = [("    return 0\n", REFERENCE), ("    return sum(numbers) / len(numbers)\n", REFERENCE)] * 3
    assert grade("code", pairs, LIMITS, threads=2) == [False, True] * 3
    assert grade("gsm8k", [("1", "1"), ("2", None), ("2", "1")], LIMITS) == [True, None, False]


@pytest.mark.skipif("JF_HUMANEVAL" not in os.environ, reason="JF_HUMANEVAL names no HumanEval.jsonl.gz")
def test_humanevals_own_solutions_are_right_and_others_are_not() -> None:
    lines = gzip.decompress(Path(os.environ["JF_HUMANEVAL"]).read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    references = [BENCHMARKS["humaneval"].question(row).reference for row in rows]

    def right(responses: list[str]) -> int:
        return sum(grade("code", list(zip(responses, references, strict=True)), LIMITS, threads=2))

    assert len(rows) == 164
    assert right([row["canonical_solution"] for row in rows]) == 164
    assert right([f"```python\n{row['prompt']}{row['canonical_solution']}```" for row in rows]) == 164
    assert right(["    return NotImplemented\n"] * 164) == 0
    # Each solution under the next task's prompt.
    assert right([row["canonical_solution"] for row in rows[1:] + rows[:1]]) == 0
    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(lambda r: is_right("code", "    exit(0)\n", r, LIMITS), references[:20]))
