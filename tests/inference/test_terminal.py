"""``chat``, ``generate`` and ``calibrate``: what people see and what lands in files."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.inference import loaded as loading
from jf_cluster.inference.chat import WARM_UPS, Rate, Run, Screen, answers, converse, measure_ar
from jf_cluster.inference.files import read_tasks, write_rows
from jf_cluster.inference.loaded import Loaded, Settings, load
from jf_cluster.jacobi.decoding import Generation, generate
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.sampling import GREEDY

SETTINGS = Settings(Drafting("jacobi", 8), GREEDY, max_new_tokens=24)


def expected_text(loaded: Loaded, ids: list[int], tokens: int = 24) -> str:
    (made,) = generate(loaded.model, [ids], max_new_tokens=tokens, end_ids=loaded.end_ids, drafting=AUTOREGRESSIVE)
    return loaded.decode(made.tokens)


def test_a_small_model_gets_one_thread_unless_told_otherwise(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(loading, "CORES", 2)
        load(str(directory), device="cpu", threads=2)
        assert torch.get_num_threads() == 2
        load(str(directory), device="cpu")
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(loading, "PARAMETERS_PER_THREAD", 1000)
        load(str(directory), device="cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Terminal(io.StringIO):
    """A terminal of ten rows: what can be scrolled back to, and what was written to it in each of its lines."""

    ROWS = 10

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
            if token == "\n":
                self.row, self.column = self.row + 1, 0  # as a terminal's driver does
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif token == "\r":
                self.column = 0
            elif token.endswith("A"):
                self.row = max(self.row - int(token[2:-1]), len(self.lines) - self.ROWS, 0)
            elif token.endswith("K"):
                self.lines[self.row] = ""
            elif not token.startswith("\x1b"):
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + token + line[self.column + len(token) :]
                self.column += len(token)
        return super().write(text)


def made(forwards: int, tokens: int = 4, seconds: float = 0.0) -> Generation:
    runs = [tokens] * (forwards + 1)
    return Generation([1] * sum(runs), "length", None, forwards, sum(runs), seconds, 0.0, runs)


def test_every_forwards_run_is_counted(loaded: Loaded) -> None:
    ids = loaded.chat([{"role": "user", "content": "Hello"}])
    runs = list(answers(loaded, ids, SETTINGS))
    assert "".join(run.text for run in runs) == expected_text(loaded, ids)
    last = runs[-1]
    assert len({run.made.forwards for run in runs}) == len(last.made.accepted_runs)
    assert last.ar_tps > 0
    assert f"{last.made.forwards} forwards" in last.figures() and "times autoregressive" in last.figures()
    assert f"{last.made.tpf:.2f} tokens/forward" in last.figures()


def test_neighbouring_runs_differ_in_shade() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="standard", _environ={})
    with Screen(console) as screen:
        for forwards, text in enumerate(["one ", "", "two ", "three ", ""]):
            screen.show(Run(text, made(forwards), 0.0, 0.0))
        screen.show(Run("rest", made(4), 0.0, 0.0))
    written = console.file.getvalue()
    final = written[written.rindex("\x1b[2K") :]  # the shades are 106 and 103 among ANSI's backgrounds
    assert re.findall(r"\x1b\[30;(\d+)m([^\x1b]+)", final) == [
        ("103", "one "), ("106", "two "), ("103", "three "), ("106", "rest"),
    ]  # fmt: skip


def test_an_answer_higher_than_the_terminal_stands_there_once_and_costs_the_same_to_its_end() -> None:
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=60, height=Terminal.ROWS, _environ={})
    words = [f"w{n:04}" + ("\n" if n % 7 == 0 else " ") for n in range(1500)]
    cost = []
    with Screen(console) as screen:
        for forwards in range(500):
            before = terminal.tell()
            screen.show(Run("".join(words[3 * forwards : 3 * forwards + 3]), made(forwards), 0.0, 0.0))
            cost.append(terminal.tell() - before)
    shown = "\n".join(terminal.lines)
    assert shown.split()[: len(words)] == [word.strip() for word in words], "every word once, in order"
    assert shown.count("forwards, last run") == 1
    assert sum(cost[-100:]) < 1.1 * sum(cost[100:200]), "a full line is not written again"


def test_the_rate_is_that_of_warm_forwards(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    rate = Rate()
    seconds = [0.0, 60.0, 70.0, 71.0, 72.0]
    assert [rate.after(made(f, seconds=s)) for f, s in enumerate(seconds)] == [0.0] * (WARM_UPS + 1) + [4.0, 4.0]

    now = [0.0]
    monkeypatch.setattr("jf_cluster.jacobi.engine.time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls = itertools.count()

    def cold_then_warm(*_: object) -> None:
        now[0] += 1.0 if next(calls) >= WARM_UPS else 1000.0

    handle = loaded.model.register_forward_hook(cold_then_warm)
    try:
        assert measure_ar(loaded, loaded.plain("Hello"), SETTINGS) == pytest.approx(1.0)
    finally:
        handle.remove()


def test_a_question_without_an_answer_is_forgotten(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before its first token, or refused by the template: the next one is the conversation's first."""
    alternating = copy.copy(loaded.tokenizer)
    alternating.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% elif m.content == 'bad' %}{{ raise_exception('bad word') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    asked = iter(["Hi", "bad", "Hi", "more", "/quit"])
    interrupted = iter([True])

    def measured(*arguments: object) -> float:
        if next(interrupted, False):
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("jf_cluster.inference.chat.measure_ar", measured)
    converse(Loaded(loaded.model, alternating, loaded.end_ids), SETTINGS, console, lambda: next(asked))
    shown = console.file.getvalue()
    assert shown.count("(interrupted)") == 1 and shown.count("tokens/forward") == 2
    assert "roles must alternate" not in shown
    assert "the model's chat template refuses it: bad word" in shown


def test_a_conversation_grows_begins_anew_and_ends(loaded: Loaded) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    asked = iter(["Hi", "", "more", "x" * 300, "/new", "Hi", "/quit", "never"])
    prompts: list[list[dict[str, str]]] = []

    class Watched(Loaded):
        def chat(self, messages):
            prompts.append([dict(m) for m in messages])
            return super().chat(messages)

    watched = Watched(loaded.model, loaded.tokenizer, loaded.end_ids)
    converse(watched, SETTINGS, console, lambda: next(asked))
    first = expected_text(loaded, loaded.chat([{"role": "user", "content": "Hi"}]))
    assert [len(p) for p in prompts] == [1, 3, 5, 1]
    assert prompts[1][1] == {"role": "assistant", "content": first}
    shown = console.file.getvalue()
    assert "exceeds the model's context of 256" in shown.replace("\n", " ") and "tokens/forward" in shown
    assert next(asked) == "never"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")


def test_files_in_files_out(loaded: Loaded, directory: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": "One"},
        {"id": 8, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Two"}]},
        {"id": 9, "prompt": "y" * 250},
        {"id": 10, "prompt": "Three, longer"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    code, said = run(
        "generate", str(directory), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"),
        "--mode", "multiblock", "--block-size", "6", "--max-new-tokens", "20", "--batch", "2",
    )  # fmt: skip
    assert code == 0, said
    assert "3 responses, 1 prompts that did not fit" in said
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in out] == [7, 8, 9, 10]
    assert "exceeds the model's context" in out[2]["error"] and "response" not in out[2]
    for row in (out[0], out[1], out[3]):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        assert row["response"] == expected_text(loaded, loaded.chat(messages), 20)
        assert row["finish_reason"] in ("end", "length") and 0 < row["forwards"] < row["tokens"]
    assert not (tmp_path / "out.jsonl.partial").exists()

    (tmp_path / "in.txt").write_text("One\n")
    stop = expected_text(loaded, loaded.plain("One"), 20)[3:5]
    code, said = run(
        "generate", str(directory), str(tmp_path / "in.txt"), str(tmp_path / "plain.jsonl"), "--plain",
        "--mode", "jacobi", "--max-new-tokens", "20", "--stop", stop,
    )  # fmt: skip
    assert code == 0, said
    (row,) = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    whole = expected_text(loaded, loaded.plain("One"), 20)
    assert row["response"] == whole[: whole.index(stop)] and row["finish_reason"] == "stop"


def test_an_earlier_answer_of_a_row_is_not_carried_over(directory: Path, tmp_path: Path) -> None:
    """Rows that did not fit are asked again with shorter responses, and the other way round."""
    path, options = tmp_path / "rows.jsonl", ("--mode", "ar", "--max-new-tokens")
    path.write_text(json.dumps({"id": 1, "prompt": "y" * 200}))
    for length, count in (("100", 0), ("20", 1), ("100", 0)):
        code, said = run("generate", str(directory), str(path), str(path), *options, length)
        assert code == 0 and f"{count} responses, {1 - count} prompts that did not fit" in said
        (row,) = [json.loads(line) for line in path.read_text().splitlines()]
        assert row["id"] == 1 and ("response" in row, "error" in row) == (count == 1, count == 0)


def test_lines_end_at_line_feeds_only(loaded: Loaded, tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c\x85d", "e\x0bf\x0cg"]
    write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    (tmp_path / "in.txt").write_bytes("\r\n".join(texts).encode("utf-8-sig"))
    for name in ("in.jsonl", "in.txt"):
        tasks = read_tasks(tmp_path / name, loaded, "prompt", template=False)
        assert [task.fields["prompt"] for task in tasks] == texts and [task.line for task in tasks] == [1, 2]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', [], "line 2: not JSON"),
        ('{"question": "a"}', [], "neither messages nor a text in 'prompt'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', [], "chat template refuses it: role tool"),
        ('{"prompt": "a", "note": "\\ud83d"}', [], "line 1: not JSON: 'utf-8' codec can't encode"),
        ("", [], "has no prompts"),
        ('{"prompt": "a"}', ["--mode", "warp"], "unknown decoding mode 'warp'"),
        ('{"prompt": "a"}', ["--temperature", "-1"], "temperature"),
        ('{"prompt": "a"}', ["--dtype", "int3"], "unknown dtype 'int3'"),
        ('{"prompt": "a"}', ["--seed", "-1"], "than or equal to 0"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(
    directory: Path, tmp_path: Path, content: str, options: list[str], message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    code, said = run("generate", str(directory), str(tmp_path / "in.jsonl"), str(tmp_path / "out"), *options)
    assert code == 2 and message in said and not (tmp_path / "out").exists()


def test_a_directory_is_no_output(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("One\n")
    code, said = run("generate", str(directory), str(tmp_path / "in.txt"), str(tmp_path), "--mode", "ar")
    assert code == 2 and "is a directory" in said


def test_calibrating_shows_what_was_measured_and_auto_uses_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TOKENS", 12), ("BLOCK_SIZES", (4,)), ("BLOCKS", (2,)), ("POOLS", (2,))):
        monkeypatch.setattr(f"jf_cluster.jacobi.calibration.{name}", value)
    model = shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("One\nAnother one\n")
    code, said = run("calibrate", str(model), "--prompts", str(tmp_path / "prompts.txt"))
    assert code == 0, said
    assert "jacobi, block" in said and "tokens/s" in said and f"kept in {model}" in said.replace("\n", "")
    (entry,) = json.loads((model / "decoding.json").read_text()).values()
    code, said = run("generate", str(model), str(tmp_path / "prompts.txt"), str(tmp_path / "out.jsonl"))
    assert code == 0 and f"decoding: {entry['explanation']}" in said, said
    (tmp_path / "prompts.txt").write_text("z" * 300 + "\n")
    code, said = run("calibrate", str(model), "--prompts", str(tmp_path / "prompts.txt"))
    assert code == 2 and "none of the prompts leaves room" in said


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for command in (["chat"], ["serve"]):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "nowhere")])
        assert result.exit_code == 2 and "the directory does not exist" in result.output
