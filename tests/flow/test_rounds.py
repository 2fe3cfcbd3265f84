"""What is due, what refuses to go together, and what the report says; no Ray is needed to decide."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jf_cluster import locks
from jf_cluster.collect.prompts import PromptsError
from jf_cluster.config import Config, ConfigError
from jf_cluster.evaluate.evaluation import Evaluation, ModeResult, load_evaluation, save_evaluation
from jf_cluster.models import ModelError
from jf_cluster.planning import memory
from jf_cluster.planning.estimate import Rates, stages
from jf_cluster.planning.shapes import read_shape
from jf_cluster.preflight import PreflightError, check
from jf_cluster.report import write_report
from jf_cluster.rounds import Rounds, RunBusyError, opened
from jf_cluster.status import StatusReader
from jf_cluster.typed import Typed
from tests.flow.conftest import run, small_config


def begun(config: Config, typed: Typed | None = None) -> None:
    with opened(config, typed):
        pass


def test_a_run_keeps_its_settings(tmp_path: Path, base_model: Path) -> None:
    begun(small_config(tmp_path, base_model))
    with pytest.raises(ConfigError, match=r"train\.learning_rate: 1e-06 before, 0\.001 now"):
        begun(small_config(tmp_path, base_model, train__learning_rate=0.001))
    with pytest.raises(ConfigError, match=r"collect\.block_size"):
        begun(small_config(tmp_path, base_model, collect__block_size=[8, 16]))


def test_how_a_run_is_carried_out_may_change(tmp_path: Path, base_model: Path) -> None:
    begun(small_config(tmp_path, base_model, rounds=2))
    begun(small_config(tmp_path, base_model, rounds=3, collect__workers=1, train__keep_checkpoints=1))
    begun(small_config(tmp_path, base_model, rounds=1))
    assert "rounds: 3" in (tmp_path / "small" / "config.yaml").read_text(), "rounds only grow"


@pytest.mark.parametrize("after_last", [True, False])
def test_the_collection_with_the_last_model_can_be_left_out(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch, after_last: bool
) -> None:
    config = small_config(tmp_path, base_model, rounds=2, collect__after_last=after_last)
    done: list[tuple[str, int]] = []
    for stage in ("_evaluate", "_make_models", "_collect"):
        monkeypatch.setattr(Rounds, stage, lambda _, number, stage=stage: done.append((stage, number)))
    monkeypatch.setattr("jf_cluster.rounds.print_evaluation", lambda *_: None)
    with opened(config) as rounds:
        rounds.distill()
    assert done[-1] == (("_collect", 3) if after_last else ("_evaluate", 2))
    assert StatusReader(config).read().stages_left == 7 + after_last
    assert stages(config, Rates(*[1.0] * 6))[0].count == 2 + after_last


def test_models_may_be_measured_on_another_task(tmp_path: Path, base_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "How many?", "answer": "#### 1"}))
    own = small_config(tmp_path, base_model)
    asked = {"evaluate__task": "gsm8k", "evaluate__source": str(rows)}
    begun(own)
    recorded = (own.run_dir / "config.yaml").read_text()
    evaluated(own)
    other = small_config(tmp_path, base_model, **asked)
    with opened(other, any_task=True) as rounds:
        assert not rounds.evaluated(0) and rounds.config == own
        save_evaluation(other, load_evaluation(own, 0).model_copy(update={"task": "gsm8k"}), beside=True)
        assert rounds.evaluated(0)
    assert (own.run_dir / "config.yaml").read_text() == recorded
    with opened(own) as rounds:
        assert rounds.evaluated(0) and load_evaluation(own, 0).task == "held_out"
    with pytest.raises(ConfigError, match=r"evaluate\.task: 'held_out' before, 'gsm8k' now"):
        begun(other)  # to collect or train
    for changes, message in [
        (
            asked | {"evaluate__prompts": 3},
            r"evaluated on gsm8k with other settings:\n  evaluate\.prompts: 12 before, 3",
        ),
        (asked | {"train__learning_rate": 0.001}, r"begun with other settings:\n  train\.learning_rate"),
        ({"evaluate__prompts": 3}, r"begun with other settings:\n  evaluate\.prompts: 12 before, 3 now"),
    ]:
        with (
            pytest.raises(ConfigError, match=message),
            opened(small_config(tmp_path, base_model, **changes), any_task=True),
        ):
            pass
    with opened(small_config(tmp_path, base_model, **asked, evaluate__batch_prompts=2), any_task=True):
        pass


def test_two_processes_do_not_work_on_one_run(config: Config) -> None:
    with opened(config), pytest.raises(RunBusyError, match="another process"):
        begun(config)
    begun(config)


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_costs_one_warning(
    missing: int, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(locks, "_told", set())
    with opened(config) as rounds:
        assert rounds.tracker.run_id is not None, "nor has the MLflow store any"
    told = [record.getMessage() for record in caplog.records if "cannot be locked" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith(str(config.run_dir / "lock"))


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        begun(small_config(tmp_path / "runs", tmp_path / "model"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collect__responses": "verified", "prompts__grader": "none"}, "needs a grader"),
        ({"evaluate__prompts": 50}, "must not exceed prompts.held_out"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, base_model: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(small_config(tmp_path, base_model, **changes))


def test_too_little_disk_is_told_with_figures(tmp_path: Path, base_model: Path) -> None:
    with pytest.raises(PreflightError, match=r"prompts\.per_round: .*GiB of disk .*lower prompts\.per_round"):
        check(small_config(tmp_path, base_model, prompts__per_round=10**9, collect__max_new_tokens=10**5))


def test_a_run_that_goes_on_has_room_where_it_lies_already(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk that held the whole run, a run half written leaves room for the other half alone."""
    config = small_config(tmp_path, base_model)
    stored, run = memory.disk(config, read_shape(config))
    free = stored + run.total
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check(config)

    def write(path: str, size: int) -> None:
        nonlocal free
        file = config.run_dir / path
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size))
        free -= 512 * file.stat().st_blocks

    write("store/round-001/shard", stored // 2)
    write("checkpoints/round-001/step-000002/states", run.parts["checkpoints"] // 2)
    check(config)
    free -= 1 << 20  # somebody else's
    with pytest.raises(PreflightError, match=r"train\.keep_checkpoints: the run needs about \d+ MiB of disk more"):
        check(config)
    for number in (1, 2, 3):  # only checkpoints would not fit, and none is made any more
        write(f"models/round-{number:03d}/model.safetensors", run.parts["models"] // config.rounds)
    (config.run_dir / "checkpoints" / "round-001" / "step-000002" / "states").unlink()
    free = stored
    check(config)


def test_too_little_memory_is_told_with_figures(tmp_path: Path, base_model: Path) -> None:
    with pytest.raises(PreflightError, match=r"collect\.workers: .*GiB of memory a node .*lower it"):
        check(small_config(tmp_path, base_model, collect__workers=10**5))


@pytest.mark.parametrize("stage", ["collect", "train"])
def test_round_zero_is_the_base(config: Config, stage: str) -> None:
    with opened(config) as rounds, pytest.raises(ConfigError, match="round 0 is the base"):
        getattr(rounds, stage)(0)


def test_a_round_whose_way_there_has_too_few_prompts_is_refused_before_anything_starts(
    tmp_path: Path, base_model: Path
) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(json.dumps({"question": f"How many is {i} and {i + 1}?"}) for i in range(200)))
    prompts = {"source": str(source), "per_round": 40, "held_out": 5, "grader": "none"}
    config = small_config(tmp_path / "runs", base_model, rounds=3, prompts=prompts, evaluate__prompts=5)
    with pytest.raises(PromptsError, match="collecting up to round 9 needs 360 distinct training prompts"):
        begun(config, Typed(round=9))
    assert not (tmp_path / "runs").exists()
    begun(config, Typed(round=4))


def test_what_comes_next_is_said_with_the_settings_in_use(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    Path(config.model_dir(1)).mkdir(parents=True)
    typed = Typed(Path("mine.yaml"), ("name=small",), round=1)
    with caplog.at_level("INFO"), opened(config, typed) as rounds:
        rounds.train(1)
    assert "model 1 is trained already; next: make evaluate CONFIG=mine.yaml ROUND=1 SET=name=small" in caplog.text


def evaluated(config: Config) -> None:
    """Save an evaluation of the base."""
    mode = ModeResult(accuracy=0.5, tpf=1.5, tps=100.0, same_as_ar=1.0)
    save_evaluation(
        config,
        Evaluation(
            round=0,
            model_hash="0",
            prompts=1,
            rejected=0,
            speed_prompts=1,
            ar=mode,
            jacobi=mode.model_copy(update={"tps": 150.4}),
            multiblock=mode.model_copy(update={"tpf": 2.5, "tps": 175.6}),
            tps_transformers=120.0,
            agreement_with_base=1.0,
            responses_same_as_base=1.0,
            unfinished=0,
            accuracy_drop=0.0,
            passed=True,
            reason="",
            seconds=1.0,
            responses={},
        ),
    )


def test_the_report_has_what_is_known_so_far(config: Config) -> None:
    evaluated(config)
    write_report(config)
    (row,) = json.loads((config.run_dir / "report.json").read_text())["rounds"]
    assert list(row) == [
        *("round", "block_size", "samples", "iterations_per_block", "tpf_jacobi", "tpf_multiblock"),
        *("tps_ar", "tps_jacobi", "tps_multiblock", "tps_strongest_ar"),
        *("accuracy_ar", "accuracy_jacobi", "accuracy_multiblock", "agreement_with_base"),
        *("seconds_collect", "seconds_train"),
    ]
    assert row["tpf_jacobi"] == 1.5 and row["seconds_train"] == 0 and row["block_size"] is None


def test_the_report_as_the_readme_has_it(config: Config) -> None:
    evaluated(config)
    (config.run_dir / "collecting").mkdir()
    (config.run_dir / "collecting" / "round-001.json").write_text('{"seconds": 61.6}')
    settings = config.runs_dir.with_name("small.yaml")
    settings.write_text(config.to_yaml())
    done = run(sys.executable, "-m", "jf_cluster", "report", "--markdown", "--config", str(settings))
    assert done.stdout == (
        "| round | block size | samples | iterations per block | TPF Jacobi | TPF multi-block | TPS AR | TPS Jacobi "
        "| TPS multi-block | speed-up | accuracy | agreement with base | seconds collect | seconds train |\n"
        f"|{' --- |' * 14}\n"
        "| 0 | - | - | - | 1.50 | 2.50 | 100 | 150 | 176 | 1.25 | 50.0% | 100.0% | 62 | 0 |\n"
    )
