"""Benchmarks: rows of a file or the hub become questions with what judges the answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jf_cluster.collect.prompts import PromptsError
from jf_cluster.config import Config, ConfigError, SandboxConfig
from jf_cluster.evaluate.graders import is_right
from jf_cluster.evaluate.tasks import evaluation_prompts, grader_of, questions
from jf_cluster.models import load_tokenizer
from jf_cluster.preflight import check
from tests.flow.conftest import small_config

HUMANEVAL = [
    {
        "task_id": f"mine/{n}",
        "prompt": f'def plus{n}(x):\n    """Add {n}."""\n',
        "entry_point": f"plus{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(3)
]
MBPP = [
    {
        "task_id": 1,
        "text": "Write a function that doubles.",
        "code": "def double(x):\n    return 2 * x",
        "test_list": ["assert double(2) == 4", "assert double(w) == 6"],
        "test_setup_code": "w = 3",
    }
]
SANITIZED = [{**{k: v for k, v in MBPP[0].items() if k not in ("text", "test_setup_code")}, "prompt": "Double it.",
              "test_imports": ["w = 3"]}]  # fmt: skip
GSM8K = [{"question": f"How much is 1 + {n}?", "answer": f"1 + {n} = {n + 1}\n#### {n + 1}"} for n in range(5)]
MATH = [{"problem": "Half of one?", "solution": r"It is $\boxed{\frac12}$.", "level": "Level 1"}]

LIMITS = SandboxConfig(seconds=30)


def configured(directory: Path, model: Path, task: str, rows: list[dict], suffix: str = ".jsonl") -> Config:
    source = directory / f"rows{suffix}"
    text = "\n".join(map(json.dumps, rows))
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif suffix.endswith(".gz"):
        source.write_bytes(gzip.compress(text.encode()))
    else:
        source.write_text(text)
    changes = {"evaluate__task": task, "evaluate__source": str(source)}
    return small_config(directory / "runs", model, **changes)


@pytest.mark.parametrize(
    ("task", "rows", "answer"),
    [
        ("humaneval", HUMANEVAL, "```python\ndef plus0(x):\n    return x\n```"),
        ("mbpp", MBPP, MBPP[0]["code"]),
        ("mbpp", SANITIZED, f"```python\n{MBPP[0]['code']}\n```"),
        ("gsm8k", GSM8K, "So #### 1"),
        ("math", MATH, r"\boxed{0.5}"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_become_questions_that_their_answers_answer(
    tmp_path: Path,
    base_model: Path,
    task: str,
    rows: list[dict],
    answer: str,
    suffix: str,
) -> None:
    config = configured(tmp_path, base_model, task, rows, suffix)
    found = questions(config)
    assert len(found) == len(rows)
    assert is_right(grader_of(config), answer, found[0].reference, LIMITS)
    assert not is_right(grader_of(config), "I do not know 7", found[0].reference, LIMITS)


def test_models_that_are_talked_to_get_a_message_and_others_a_text(tmp_path: Path, base_model: Path) -> None:
    config = configured(tmp_path, base_model, "humaneval", HUMANEVAL)
    tokenizer = load_tokenizer(config)
    plain = config.model_copy(update={"prompts": config.prompts.model_copy(update={"template": "plain"})})
    assert [p.text for p in evaluation_prompts(plain, tokenizer)] == [row["prompt"] for row in HUMANEVAL]
    tokenizer.chat_template = "{{ messages[0]['content'] }}|"
    (first, *_) = evaluation_prompts(config, tokenizer)
    assert first.text.startswith("Complete this function.") and HUMANEVAL[0]["prompt"] in first.text
    assert tokenizer.decode(first.tokens).endswith("```|")


def test_the_first_prompts_are_taken_each_once(tmp_path: Path, base_model: Path) -> None:
    config = configured(tmp_path, base_model, "gsm8k", GSM8K[:2] + GSM8K)
    fewer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": 3})})
    tokenizer = load_tokenizer(config)
    assert [p.text for p in evaluation_prompts(fewer, tokenizer)] == [row["question"] for row in GSM8K[:3]]
    check(config)  # fewer rows than evaluate.prompts asks for are no mistake: benchmarks are as long as they are


def test_what_cannot_be_is_said(tmp_path: Path, base_model: Path) -> None:
    config = configured(tmp_path, base_model, "mbpp", GSM8K)
    with pytest.raises(PromptsError, match=r"no column 'text', which mbpp has; it has question, answer"):
        questions(config)
    drawn = {"source": config.evaluate.source, "answer_column": "answer"}
    same = config.model_copy(update={"prompts": config.prompts.model_copy(update=drawn)})
    with pytest.raises(ConfigError, match="asked what it was trained on"):
        check(same)
    missing = config.evaluate.model_copy(update={"source": str(tmp_path / "no.jsonl")})
    with pytest.raises(PromptsError, match=r"no file .*no.jsonl \(evaluate.source\)"):
        check(config.model_copy(update={"evaluate": missing}))
