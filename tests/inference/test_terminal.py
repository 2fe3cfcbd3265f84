"""``chat``, ``generate`` and ``calibrate``: what people see and what lands in files."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.inference import loaded as loading
from jf_cluster.inference.chat import SHADES, answers, converse
from jf_cluster.inference.loaded import Loaded, Settings, load
from jf_cluster.jacobi.decoding import generate
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


def test_every_forwards_run_is_shaded_and_counted(loaded: Loaded) -> None:
    ids = loaded.chat([{"role": "user", "content": "Hello"}])
    *_, answer = answers(loaded, ids, SETTINGS)
    assert answer.text == expected_text(loaded, ids)
    assert len(answer.runs) == len(answer.made.accepted_runs)
    spans = answer.rendered().spans
    assert [answer.rendered().plain[s.start : s.end] for s in spans] == [run for run in answer.runs if run]
    assert {s.style for s in spans} <= set(SHADES) and len({s.style for s in spans}) == 2
    assert answer.ar_tps > 0
    assert f"{answer.made.forwards} forwards" in answer.figures() and "times autoregressive" in answer.figures()
    assert f"{answer.made.tpf:.2f} tokens/forward" in answer.figures()


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


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', [], "line 2: not JSON"),
        ('{"question": "a"}', [], "neither messages nor a text in 'prompt'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', [], "chat template refuses it: role tool"),
        ("", [], "has no prompts"),
        ('{"prompt": "a"}', ["--mode", "warp"], "unknown decoding mode 'warp'"),
        ('{"prompt": "a"}', ["--temperature", "-1"], "temperature"),
        ('{"prompt": "a"}', ["--dtype", "int3"], "unknown dtype 'int3'"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(
    directory: Path, tmp_path: Path, content: str, options: list[str], message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    code, said = run("generate", str(directory), str(tmp_path / "in.jsonl"), str(tmp_path / "out"), *options)
    assert code == 2 and message in said and not (tmp_path / "out").exists()


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
