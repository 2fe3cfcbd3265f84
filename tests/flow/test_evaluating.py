"""An evaluation decodes the held-out prompts in every mode and says how good and how fast the model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from ray.exceptions import OutOfMemoryError

from jf_cluster.collect.crew import Crew
from jf_cluster.collect.prompts import held_out_prompts
from jf_cluster.config import Config
from jf_cluster.evaluate import load_evaluation
from jf_cluster.evaluate.comparison import compare
from jf_cluster.evaluate.evaluating import EvaluateError, evaluate_round
from jf_cluster.evaluate.evaluation import MODES, Evaluation, ModeResult, evaluation_path
from jf_cluster.evaluate.graders import is_right
from jf_cluster.evaluate.scoring import wilson
from jf_cluster.jacobi.oracle import encode_trajectories
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.sampling import prompt_key
from jf_cluster.models import end_ids, load_model, load_tokenizer
from jf_cluster.tracking import Tracker
from jf_cluster.tracking.store import SUPERSEDED_BY
from tests.flow.conftest import small_config

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, base_model: Path, other_model: Path, local_ray: None):
    """Evaluations of the base and of another model that stands for round 1's."""
    config = small_config(
        tmp_path_factory.mktemp("evaluated"), base_model, prompts__grader="gsm8k", evaluate__multiblock_prompts=8
    )
    shutil.copytree(other_model, config.model_dir(1))
    tracker = Tracker.open(config)
    with Crew.given_or_own(None, config) as crew:
        return config, evaluate_round(config, 0, tracker, crew), evaluate_round(config, 1, tracker, crew)


def test_responses_and_accuracy_are_the_models(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    config, base, _ = evaluated
    tokenizer, model = load_tokenizer(config), load_model(config, 0)
    prompts = held_out_prompts(config, tokenizer)
    written = generate_responses(
        model, [p.tokens for p in prompts], max_new_tokens=20, end_ids=end_ids(model, tokenizer)
    )
    texts = [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in written]
    assert base.responses == {p.prompt_id: text for p, text in zip(prompts, texts, strict=True)}
    right = sum(is_right("gsm8k", text, p.answer) for p, text in zip(prompts, texts, strict=True))
    assert base.ar.accuracy == right / 12
    assert base.passed
    assert base.unfinished == sum(not r.finished for r in written)


def test_every_mode_gives_the_ar_output_in_float32(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    for evaluation in evaluated[1:]:
        assert evaluation.ar.tpf == 1.0
        assert evaluation.jacobi.accuracy == evaluation.ar.accuracy
        for result in (evaluation.ar, evaluation.jacobi, evaluation.multiblock):
            assert result.same_as_ar == 1.0
            assert result.tpf >= 1.0 and result.tps > 0


def test_mode_multiblock_is_judged_on_the_first_prompts_only(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    config, *evaluations = evaluated
    first = [p.prompt_id for p in held_out_prompts(config, load_tokenizer(config))[:8]]
    for evaluation in evaluations:
        assert evaluation.right is not None and evaluation.prompts == 12
        assert evaluation.multiblock.accuracy == sum(evaluation.right[i] for i in first) / 8
        assert evaluation.multiblock.interval == wilson(sum(evaluation.right[i] for i in first), 8)


def test_how_a_model_differs_from_earlier_ones_is_kept_and_shown(
    evaluated: tuple[Config, Evaluation, Evaluation],
) -> None:
    config, base, other = evaluated
    [against_base] = other.comparisons
    assert base.comparisons == () and against_base == compare(other, base)
    assert load_evaluation(config, 1) == other
    tracker = Tracker.open(config)
    run_id = tracker.stage_run(1, "evaluate")
    history = MlflowClient(tracker.uri).get_metric_history(run_id, "against_earlier/tpf_ratio_multiblock")
    assert [(point.step, point.value) for point in history] == [(0, other.multiblock.tpf / base.multiblock.tpf)]


def test_figures_are_those_of_the_answers(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    for evaluation in evaluated[1:]:
        assert evaluation.right is not None and sum(evaluation.right.values()) == (evaluation.ar.accuracy or 0) * 12
        assert evaluation.strongest_ar_tps == max(evaluation.ar.tps, evaluation.tps_transformers or 0)
        assert (evaluation.tps_transformers or 0) > 0 and evaluation.task == "held_out"
        for mode in MODES:
            result = evaluation.mode(mode)
            assert result.interval is not None and result.interval[0] <= (result.accuracy or 0) <= result.interval[1]
            assert sum(result.acceptance) == pytest.approx(result.tpf)
            assert result.acceptance[0] == 1.0 and list(result.acceptance) == sorted(result.acceptance, reverse=True)
        assert evaluation.ar.acceptance == (1.0,)


def test_blocks_are_iterated_as_one_after_the_other(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    """Against the oracle, which decodes one block after the other from the same initial guesses."""
    config, base, _ = evaluated
    tokenizer, model = load_tokenizer(config), load_model(config, 0)
    ends, iterations = end_ids(model, tokenizer), []
    for prompt in held_out_prompts(config, tokenizer)[:8]:
        (response,) = generate_responses(model, [prompt.tokens], max_new_tokens=20, end_ids=ends)
        key = prompt_key(config.seed, 0, prompt.prompt_id)
        iterations += encode_trajectories(model, prompt.tokens, response.tokens, block_size=32, key=key)[0]
    assert base.block_size == 32
    assert base.iterations_per_block == pytest.approx(sum(iterations) / len(iterations))


def test_agreement_is_measured_against_the_base(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    _, base, other = evaluated
    assert base.agreement_with_base == base.responses_same_as_base == 1.0
    same = sum(other.responses[i] == base.responses[i] for i in base.responses)
    assert other.responses_same_as_base == same / 12 < 1.0


def test_the_file_is_read_back_and_not_made_again(evaluated: tuple[Config, Evaluation, Evaluation]) -> None:
    config, base, _ = evaluated
    before = evaluation_path(config, 0).stat().st_mtime_ns
    assert load_evaluation(config, 0) == base == evaluate_round(config, 0, Tracker.open(config))
    assert evaluation_path(config, 0).stat().st_mtime_ns == before


def test_another_task_is_measured_beside_the_runs_own(
    evaluated: tuple[Config, Evaluation, Evaluation], tmp_path: Path
) -> None:
    config, base, other = evaluated
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps({"question": f"What is {n}?", "answer": f"#### {n}"}) for n in range(3)))
    task = {"task": "gsm8k", "source": str(source), "speed_prompts": 1}
    asked = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=task)})
    tracker, card = Tracker.open(config), Path(config.model_dir(1)) / "README.md"
    runs, told = [tracker.stage_run(r, "evaluate") for r in (0, 1)], card.read_text()
    with Crew.given_or_own(None, asked) as crew:
        evaluate_round(asked, 0, tracker, crew, beside=True)
        found = evaluate_round(asked, 1, tracker, crew, beside=True)
    assert (found.task, found.prompts) == ("gsm8k", 3) and found.comparisons[0].before == 0
    assert found == load_evaluation(asked, 1, beside=True) == evaluate_round(asked, 1, tracker, beside=True)
    assert evaluation_path(asked, 1, beside=True).name == "round-001-gsm8k.json"
    assert (load_evaluation(config, 0), load_evaluation(config, 1), card.read_text()) == (base, other, told)
    assert [tracker.stage_run(r, "evaluate") for r in (0, 1)] == runs
    mlflow = MlflowClient(tracker.uri)
    assert mlflow.get_run(tracker.stage_run(1, "evaluate-gsm8k")).data.metrics["tpf_jacobi"] == found.jacobi.tpf
    assert all(SUPERSEDED_BY not in mlflow.get_run(run).data.tags for run in runs)


def test_the_base_goes_first(tmp_path: Path, base_model: Path, other_model: Path) -> None:
    config = small_config(tmp_path, base_model)
    shutil.copytree(other_model, config.model_dir(1))
    with pytest.raises(EvaluateError, match="base model is evaluated first"):
        evaluate_round(config, 1, Tracker.open(config))


class OutOfMemoryOnce(Crew):
    """Its first host that is asked for something is killed for its memory."""

    asked = 0

    def ask(self, *arguments: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise OutOfMemoryError("Task was killed due to the node running low on memory.")
        return super().ask(*arguments)


def test_measuring_speed_goes_on_after_a_worker_was_killed_for_its_memory(tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, evaluate__speed_prompts=1, collect__workers=1)
    crew = OutOfMemoryOnce(config)
    assert evaluate_round(config, 0, Tracker.open(config), crew).ar.tps > 0 and crew.asked > 1
    crew.dismiss()


def test_a_model_that_lost_accuracy_is_marked(
    evaluated: tuple[Config, Evaluation, Evaluation], tmp_path: Path, base_model: Path, other_model: Path
) -> None:
    """The other random model is no better than chance; a base that was said to be right drops against it."""
    _, base, _ = evaluated
    changes = {"prompts__grader": "gsm8k", "evaluate__speed_prompts": 1, "collect__workers": 1}
    again = small_config(tmp_path, base_model, **changes)
    shutil.copytree(other_model, again.model_dir(1))
    path = evaluation_path(again, 0)
    path.parent.mkdir(parents=True)
    good = ModeResult(**{**base.ar.model_dump(), "accuracy": 1.0})
    path.write_text(base.model_copy(update={"ar": good}).model_dump_json())
    evaluation = evaluate_round(again, 1, Tracker.open(again))
    card = (Path(again.model_dir(1)) / "README.md").read_text()
    assert f"| round 1 | jacobi | {evaluation.jacobi.tpf:.2f} | {evaluation.jacobi.tps:.0f} |" in card
    assert not evaluation.passed and "more than the 2.0 that evaluate.max_accuracy_drop allows" in evaluation.reason
    assert evaluation.accuracy_drop == pytest.approx(1.0 - (evaluation.ar.accuracy or 0.0))


def test_a_benchmark_from_a_local_file(tmp_path: Path, base_model: Path, other_model: Path) -> None:
    check = "def check(f):\n    assert f() == 1"
    rows = [{"prompt": f"def f{n}():\n    'Give 1.'\n", "entry_point": f"f{n}", "test": check} for n in range(3)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    changes = {"evaluate__task": "humaneval", "evaluate__source": str(source), "prompts__grader": "none"}
    config = small_config(tmp_path / "runs", base_model, collect__workers=1, **changes)
    evaluation = evaluate_round(config, 0, Tracker.open(config))
    assert (evaluation.task, evaluation.prompts, evaluation.ar.accuracy) == ("humaneval", 3, 0.0)
    assert evaluation.right is not None and not any(evaluation.right.values()) and len(evaluation.right) == 3
    shutil.copytree(other_model, config.model_dir(1))
    other_task = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"task": "held_out"})})
    with pytest.raises(EvaluateError, match="evaluated on humaneval, not on held_out"):
        evaluate_round(other_task, 1, Tracker.open(config))
