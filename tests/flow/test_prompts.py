"""Prompts: read from any source, split by their text, sliced by round, refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from jf_cluster.collect import sources
from jf_cluster.collect.prompts import (
    PromptsError,
    check_prompts,
    held_out_prompts,
    load_prompts,
    pin,
    tokenized,
    unusable,
)
from jf_cluster.config import Config
from jf_cluster.models import load_tokenizer
from jf_cluster.tiny.pretrain import encode
from jf_cluster.tiny.problems import split_of
from tests.flow.conftest import small_config

TEXTS = [f"How many is {i} and {i + 1}?" for i in range(400)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(small_config(tmp_path_factory.mktemp("tokenizer"), base_model))


def written(directory: Path, base_model: Path, rows: list[dict], kind: str = "jsonl", **prompts: object) -> Config:
    source = directory / f"questions.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    section = {"source": str(source), "per_round": 50, "held_out": 10, **prompts}
    return small_config(directory / "runs", base_model, prompts=section)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_local_files(tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    rows = [{"question": text, "answer": f"so #### {i}"} for i, text in enumerate(TEXTS)]
    config = written(tmp_path, base_model, rows, kind, answer_column="answer", grader="gsm8k")
    prompts = load_prompts(config, tokenizer, 1)
    assert len(prompts) == 50
    assert all(rows[TEXTS.index(p.text)]["answer"] == p.answer for p in prompts)


def test_held_out_prompts_are_never_trained_on_whatever_the_order(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained, held_out = set(), set()
    for turn, order in enumerate([TEXTS, TEXTS[::-1], random.Random(0).sample(TEXTS, 400)]):
        directory = tmp_path / str(turn)
        directory.mkdir()
        rows = [{"question": text} for text in order + order[:30]]
        config = written(directory, base_model, rows, per_round=370)
        trained |= {p.text for p in load_prompts(config, tokenizer, 1)}
        held_out |= {p.text for p in held_out_prompts(config, tokenizer)}
    assert len(held_out) >= 10 and not trained & held_out


def test_fresh_rounds_share_no_prompt(tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for config in (
        written(tmp_path, base_model, [{"question": t} for t in TEXTS]),
        small_config(tmp_path / "runs", base_model, prompts__per_round=50),
    ):
        rounds = [{p.prompt_id for p in load_prompts(config, tokenizer, r)} for r in (1, 2, 3)]
        assert all(len(ids) == 50 for ids in rounds) and len(set().union(*rounds)) == 150
    same = written(tmp_path, base_model, [{"question": t} for t in TEXTS], fresh=False)
    assert [p.text for p in load_prompts(same, tokenizer, 1)] == [p.text for p in load_prompts(same, tokenizer, 2)]


def test_a_run_keeps_to_the_prompts_it_was_begun_with(tmp_path: Path, base_model: Path) -> None:
    rows = [{"question": t} for t in TEXTS]
    config = written(tmp_path, base_model, rows)
    config.run_dir.mkdir(parents=True)
    for _ in range(2):
        pin(config)
    with pytest.raises(PromptsError, match=r"it had 400 rows when the run .* was begun, and has 401 rows now"):
        pin(written(tmp_path, base_model, [*rows, {"question": "Why?"}]))
    with pytest.raises(PromptsError, match="it had other texts when"):
        pin(written(tmp_path, base_model, [{"question": f"{t}!"} for t in TEXTS]))
    pin(written(tmp_path, base_model, rows))


def test_a_text_that_comes_twice_is_one_prompt(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = written(tmp_path, base_model, [{"question": t} for t in TEXTS for _ in range(2)], per_round=300)
    assert len({p.prompt_id for p in load_prompts(config, tokenizer, 1)}) == 300


def test_tiny_prompts_are_what_the_base_was_trained_with(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = small_config(tmp_path, base_model)
    for prompt in load_prompts(config, tokenizer, 1):
        assert prompt.tokens.tolist() == encode(tokenizer, prompt.text)
    held_out = held_out_prompts(config, tokenizer)
    other_seed = config.model_copy(update={"seed": 7})
    assert [p.text for p in held_out_prompts(other_seed, tokenizer)] == [p.text for p in held_out]
    assert {p.text for p in load_prompts(other_seed, tokenizer, 1)}.isdisjoint(
        p.text for p in load_prompts(config, tokenizer, 1)
    )


def test_rows_are_taken_from_a_column_in_pieces_without_a_copy_of_all_of_it() -> None:
    column = pa.chunked_array([["a", "b"], [], [f"{i} " * 100 for i in range(1000)], ["d"]])
    rows = np.array([1002, 0, 5, 1, 0, 1001], np.int32)
    expected = column.take(pa.array(rows)).to_pylist()
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        assert sources._taken(column, rows) == expected
    finally:
        pa.set_memory_pool(usual)
    assert 0 < pool.max_memory() < column.nbytes / 10


def test_plain_prompts_have_no_template(tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = small_config(tmp_path, base_model, prompts__template="plain")
    prompt = load_prompts(config, tokenizer, 1)[0]
    assert tokenizer.decode(prompt.tokens) == prompt.text


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"text": t} for t in TEXTS], {}, "no column 'question'; it has text"),
        ([{"question": t} for t in TEXTS], {"answer_column": "solution"}, "no column 'solution'"),
        ([{"question": t} for t in TEXTS[:20]], {}, "needs 150 distinct training prompts"),
        ([{"question": t} for t in TEXTS[:20]], {"fresh": False}, "needs 50 distinct training prompts"),
        ([{"question": t} for t in TEXTS], {"held_out": 200}, "prompts.held_out asks for 200"),
        ([{"question": i} for i in range(400)], {}, "holds int, neither text nor messages"),
    ],
)
def test_prompts_that_cannot_be_had(
    tmp_path: Path, base_model: Path, rows: list[dict], changes: dict, message: str
) -> None:
    with pytest.raises(PromptsError, match=message):
        check_prompts(written(tmp_path, base_model, rows, **changes), 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.jsonl", None, "no file"),
        ("empty.jsonl", b"", "has no rows"),
        ("broken.jsonl", b'{"question": "a"', "cannot be read"),
        ("broken.parquet", b"no parquet at all", "cannot be read"),
        ("binary.json", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, base_model: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = small_config(tmp_path / "runs", base_model, prompts={"source": str(tmp_path / name)})
    with pytest.raises(PromptsError, match=message):
        check_prompts(config, 1)


def test_a_data_set_with_a_loading_script_is_refused(tmp_path: Path, base_model: Path) -> None:
    source = tmp_path / "questions"
    source.mkdir()
    (source / "questions.py").write_text("")
    config = small_config(tmp_path / "runs", base_model, prompts={"source": str(source)})
    with pytest.raises(PromptsError, match=r"questions \(prompts.source\) cannot be read: .*without a loading script"):
        check_prompts(config, 1)


def test_rows_without_a_text_are_left_out_and_counted(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """The others keep their order and ids."""
    texts: list[str | None] = [None if i % 40 == 7 else text for i, text in enumerate(TEXTS)]
    config = written(tmp_path, base_model, [{"question": t} for t in texts])
    lines = Path(config.prompts.source).read_bytes().split(b"\n")
    lines[0] = b'{"question": "caf\xe9"}'
    Path(config.prompts.source).write_bytes(b"\n".join(lines))
    found = load_prompts(config, tokenizer, 1)
    shuffled = datasets.Dataset.from_dict({"question": [None, *texts[1:]]}).shuffle(seed=config.seed)["question"]
    expected = [text for text in shuffled if text is not None and split_of(text) == "train"]
    assert [p.text for p in found] == expected[:50] and found.ids().to_pylist() == [p.prompt_id for p in found]
    (message,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert message.startswith("11 of the 400 rows of") and "questions.jsonl" in message and "'question'" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_are_prompted_up_to_the_users_last_message(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [
        [
            {"role": "user", "content": "Hello\u2028!"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": t},
        ]
        for t in TEXTS
    ]
    rows = [{"messages": [*messages, {"role": "assistant", "content": "so"}]} for messages in asked]
    rows.insert(7, {"messages": [{"role": "assistant", "content": "nobody asked"}]})
    config = written(tmp_path, base_model, rows, kind, column="messages")
    prompts = load_prompts(config, tokenizer, 1)[:]
    for prompt in prompts:
        messages = json.loads(prompt.text)
        assert messages in asked
        given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert prompt.tokens.tolist() == given and unusable(prompt, 10**6, 1) is None
    assert len({p.prompt_id for p in prompts}) == 50
    with pytest.raises(PromptsError, match="need a tokenizer with a chat template"):
        load_prompts(written(tmp_path, base_model, rows, kind, column="messages", template="plain"), tokenizer, 1)[0]
    check_prompts(written(tmp_path, base_model, rows, kind, column="messages", per_round=370), 1)
    assert "1 of the 401 rows" in caplog.text


def test_a_conversation_that_the_template_refuses_is_rejected_with_its_reason(tmp_path: Path, base_model: Path) -> None:
    tokenizer = load_tokenizer(small_config(tmp_path, base_model))
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    prompt = tokenized("Hello", None, tokenizer, "chat")
    assert unusable(prompt, 10**6, 1) == "the model's chat template refuses it: no tools here"


def test_a_parquet_file_without_rows(tmp_path: Path, base_model: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    config = small_config(tmp_path / "runs", base_model, prompts={"source": str(tmp_path / "empty.parquet")})
    with pytest.raises(PromptsError, match="has no rows"):
        check_prompts(config, 1)


def test_prompts_come_in_the_order_of_a_shuffle_each_text_where_it_comes_first(
    tmp_path: Path, base_model: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed in small blocks, so that texts come again in later ones."""
    monkeypatch.setattr(sources, "FIRST_BLOCK", 7)
    texts = [TEXTS[i % 250] for i in range(400)]
    config = written(tmp_path, base_model, [{"question": t} for t in texts], per_round=90)
    shuffled = datasets.Dataset.from_dict({"question": texts}).shuffle(seed=config.seed)["question"]
    expected = [t for t in dict.fromkeys(shuffled) if split_of(t) == "train"]
    for number in (1, 2):
        prompts = load_prompts(config, tokenizer, number)
        assert [p.text for p in prompts] == expected[90 * (number - 1) : 90 * number]
        assert prompts.ids().to_pylist() == [p.prompt_id for p in prompts]
        assert prompts.characters.tolist() == [len(p.text) for p in prompts]
        assert [p.text for p in prompts[-3:]] == expected[90 * number - 3 : 90 * number]
