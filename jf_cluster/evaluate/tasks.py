"""What models are evaluated on: the held-out prompts, or a benchmark's rows from the hub or a local file.

A benchmark says where its rows are, what of a row is asked and what judges the answer. Models that are talked to get an
instruction; others get text to continue. Zero examples are shown; for tasks that show some, and for any other task of
the EleutherAI harness, see ``harness.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jf_cluster.collect.prompts import Prompt, held_out_prompts, in_chat, tokenized
from jf_cluster.collect.sources import PromptsError, read_dataset
from jf_cluster.config import Config, ConfigError, Grader, Task
from jf_cluster.evaluate.graders.code import CodeReference

Row = Mapping[str, object]


@dataclass(frozen=True)
class Question:
    """A row as a question: text to be continued, the same as a message, and the reference its grader reads."""

    plain: str
    chat: str
    reference: str


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are on the hub, what judges the answers, and how a row is read."""

    source: str
    subset: str | None
    grader: Grader
    question: Callable[[Row], Question]
    """Raises KeyError where the row lacks a column."""


def _gsm8k(row: Row) -> Question:
    return Question(str(row["question"]), str(row["question"]), str(row["answer"]))


def _math(row: Row) -> Question:
    problem = str(row["problem"])
    chat = f"{problem}\n\nReason step by step and put the final answer within \\boxed{{}}."
    # The original has the answer in the solution's last box only, MATH-500 in a column of its own too.
    return Question(f"{problem}\n", chat, str(row["answer"] if "answer" in row else row["solution"]))


def _humaneval(row: Row) -> Question:
    prompt, name = str(row["prompt"]), str(row["entry_point"])
    reference = CodeReference(f"{row['test']}\ncheck({name})", prompt, name)
    chat = f"Complete this function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"
    return Question(prompt, chat, reference.to_text())


def _mbpp(row: Row) -> Question:
    # The sanitized subset has other names for two columns.
    text = str(row["prompt"] if "prompt" in row else row["text"])
    tests = _lines(row["test_list"])
    setup = _lines(row["test_imports"]) if "test_imports" in row else str(row.get("test_setup_code") or "")
    asked = f"{text}\nThe code should pass these tests:\n{tests}\n"
    chat = f"{asked}Answer with the code in one code block."
    return Question(f'"""\n{asked}"""\n', chat, CodeReference(f"{setup}\n{tests}").to_text())


def _lines(statements: object) -> str:
    assert isinstance(statements, list)
    return "\n".join(map(str, statements))


BENCHMARKS: dict[Task, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "gsm8k", _gsm8k),
    "math": Benchmark("HuggingFaceH4/MATH-500", None, "math", _math),
    "humaneval": Benchmark("openai/openai_humaneval", None, "code", _humaneval),
    "mbpp": Benchmark("google-research-datasets/mbpp", "full", "code", _mbpp),
}


def grader_of(config: Config) -> Grader:
    """What judges the answers of the configured task."""
    task = config.evaluate.task
    return config.prompts.grader if task == "held_out" else BENCHMARKS[task].grader


def evaluation_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Give the first ``evaluate.prompts`` prompts of the configured task, with the references to judge by.

    Raises:
        PromptsError: they cannot be read, or rows lack a column of that task.
        ConfigError: the benchmark's rows are those that the training prompts are drawn from.
    """
    settings = config.evaluate
    if settings.task == "held_out":
        return held_out_prompts(config, tokenizer)[: settings.prompts]
    chat, template = in_chat(tokenizer, config.prompts.template), config.prompts.template
    return [
        tokenized(q.chat if chat else q.plain, q.reference, tokenizer, template)
        for q in questions(config)[: settings.prompts]
    ]


def questions(config: Config) -> list[Question]:
    """Give the questions of the configured benchmark, each once, in their order; errors as ``evaluation_prompts``."""
    settings = config.evaluate
    benchmark = BENCHMARKS[settings.task]
    source, split = settings.source or benchmark.source, settings.split or "test"
    subset = settings.subset if settings.source or settings.subset else benchmark.subset
    drawn = config.prompts
    # A file has one split, whatever is said.
    if source == drawn.source and (Path(source).is_file() or (subset, split) == (drawn.subset, drawn.split)):
        raise ConfigError(
            f"evaluate.source and prompts.source are both {source}: a model would be asked what it was trained on. Use "
            "evaluate.task=held_out, which keeps some of the prompts aside"
        )
    rows = read_dataset(source, subset, split, "evaluate.source")
    found: dict[str, Question] = {}
    for number, row in enumerate(rows):
        try:
            question = benchmark.question(row)
        except KeyError as error:
            raise PromptsError(
                f"row {number} of {source} has no column {error}, which {settings.task} has; it has {', '.join(row)}"
            ) from error
        found.setdefault(question.plain, question)
    return list(found.values())
