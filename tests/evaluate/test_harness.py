"""The EleutherAI harness on our decoder: the same answers as with its own Hugging Face model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

GENERATING = """
task: mine_generating
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["7"], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSING = """
task: mine_choosing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" one", " two"]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{'How much ' * (n % 3)}is {n}?", "answer": "1"} for n in range(6)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("generating", GENERATING), ("choosing", CHOOSING)):
        (directory / f"{name}.yaml").write_text(text.replace("FILE", str(directory / "rows.jsonl")))
    return directory


def evaluated(model: str, base_model: Path, tasks: Path, **settings: object) -> dict:
    import jf_cluster.evaluate.harness  # noqa: F401  (registers the model)

    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(base_model), "dtype": "float32", **settings},
        tasks=["mine_generating", "mine_choosing"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=3,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )


def test_any_task_gives_what_it_gives_with_the_harness_own_model(base_model: Path, tasks: Path) -> None:
    ours = evaluated("jacobi", base_model, tasks, block_size=8)
    theirs = evaluated("hf", base_model, tasks)
    for task in ("mine_generating", "mine_choosing"):
        made, expected = ({s["doc_id"]: s["resps"] for s in results["samples"][task]} for results in (ours, theirs))
        assert made == expected and len(made) == 6
    assert ours["config"]["tokens_per_forward"] > 1.0 and ours["config"]["response_tokens"] > 6


def test_every_end_token_of_the_model_ends_an_answer(base_model: Path, tasks: Path, tmp_path: Path) -> None:
    """As of Qwen2.5-Instruct, whose generation configuration names two and whose tokenizer has one."""
    model = shutil.copytree(base_model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    usual = next(s["resps"][0][0] for s in evaluated("hf", model, tasks)["samples"]["mine_generating"])
    other = tokenizer.encode(usual, add_special_tokens=False)[3]
    (model / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], other]})
    )
    ours, theirs = (
        {s["doc_id"]: s["resps"] for s in evaluated(name, model, tasks)["samples"]["mine_generating"]}
        for name in ("jacobi", "hf")
    )
    assert ours == theirs and len(theirs[0][0][0]) < len(usual)


def test_a_penalty_of_the_checkpoint_is_warned_of(
    base_model: Path, tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(base_model, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.5}))
    with caplog.at_level("WARNING", "lm_eval"):
        ours = evaluated("jacobi", model, tasks)["samples"]["mine_generating"]
        assert caplog.text.count("a repetition penalty of 1.5, which --model hf applies") == 1
        caplog.clear()
        usual = evaluated("jacobi", base_model, tasks)["samples"]["mine_generating"]
        assert "repetition penalty" not in caplog.text
    theirs = evaluated("hf", model, tasks)["samples"]["mine_generating"]
    answers = [{s["doc_id"]: s["resps"] for s in samples} for samples in (ours, usual, theirs)]
    assert answers[0] == answers[1] != answers[2]


def test_settings_that_would_be_ignored_are_refused(base_model: Path) -> None:
    from jf_cluster.evaluate.harness import JacobiLM
    from jf_cluster.jacobi.sampling import GREEDY, Sampling

    assert JacobiLM._sampling({"do_sample": False, "temperature": 0.0, "num_beams": 1}) == GREEDY
    assert JacobiLM._sampling({"temperature": 0.5, "top_p": 0.9}) == Sampling(0.5, top_p=0.9)
    with pytest.raises(ValueError, match="num_beams"):
        JacobiLM._sampling({"num_beams": 4})
