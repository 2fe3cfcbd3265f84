"""What is refused, in which words, and that following them helps."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jf_cluster.__main__ import app
from jf_cluster.config import Config, ConfigError, load_config
from jf_cluster.planning.estimate import computed_passes
from jf_cluster.planning.fitting import changed, idle_gpus, refused_on
from jf_cluster.planning.machines import Machines
from jf_cluster.planning.scaling import model_7b
from jf_cluster.planning.shapes import read_shape, shape_of

TINY = str(Path(__file__).parent.parent.parent / "configs" / "tiny.yaml")


def plan(tmp_path: Path, *arguments: str, config: Config | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a plan without a calibration."""
    path = TINY
    if config is not None:
        path = str(tmp_path / "planned.yaml")
        Path(path).write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["plan", "--config", path, "--no-calibration", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_embedded_run_can_be_started(tmp_path: Path) -> None:
    code, shown, errors = plan(tmp_path, f"runs_dir={tmp_path / 'runs'}")
    assert (code, errors) == (0, "")
    assert "0.00251 billion parameters" in shown and "Nothing speaks against this run" in shown
    assert not (tmp_path / "runs").exists(), "a plan leaves nothing behind"


def test_computed_times_and_costs(tmp_path: Path, planned: Callable[..., Config]) -> None:
    code, shown, _ = plan(tmp_path, "--on", "8xH100", "--price-per-gpu-hour", "2.5", config=planned())
    assert code == 0 and "not measured" in shown
    (total,) = re.findall(r"│ all .*│ +([\d.]+) (h|min|s) │ +([\d,.]+) │", shown)
    seconds = float(total[0]) * {"h": 3600, "min": 60, "s": 1}[total[1]]
    assert float(total[2].replace(",", "")) == pytest.approx(seconds / 3600 * 8 * 2.5, rel=0.02)


def test_idle_gpus_are_a_warning(tmp_path: Path, planned: Callable[..., Config]) -> None:
    code, shown, errors = plan(tmp_path, "--on", "64xH100", config=planned())
    assert code == 0 and "Nothing speaks against this run" in shown
    assert errors.startswith(
        "warning: of the 64 GPUs of 64xH100 some stay idle (collect.workers uses 8, train.workers uses 8): set more"
    )
    more = {"collect.workers": 64, "train.workers": 64, "train.micro_batches_per_step": 64}
    assert plan(tmp_path, "--on", "64xH100", config=changed(planned(), more))[2] == ""
    both, machines = {"overlap": "pipelined"}, Machines.thought_of("64xH100")
    assert idle_gpus(changed(planned(), more | both), machines) is None
    said = idle_gpus(changed(planned(), both), machines)
    assert said is not None and "collect.workers and train.workers uses 16" in said


def test_passes_over_the_data(tmp_path: Path, planned: Callable[..., Config]) -> None:
    # 100 steps of 8 micro-batches of 4,096 tokens, 97% full, over 500 samples of 200 + 600 + 300 tokens.
    config = planned(train__steps=100, prompts__per_round=500, collect__max_new_tokens=2048)
    assert computed_passes(config) == pytest.approx(100 * 8 * 4096 * 0.97 / (500 * 1100))
    _, shown, _ = plan(tmp_path, "--on", "8xH100", config=config)
    assert "A round trains on 5.8 times the tokens of its own samples" in shown


def test_a_70b_model_does_not_train_on_one_gpu(tmp_path: Path, planned: Callable[..., Config]) -> None:
    one = planned("70B", collect__workers=1, train__workers=1, train__micro_batches_per_step=1)
    code, _, errors = plan(tmp_path, "--on", "1xH100", config=one)
    assert code == 1 and "Traceback" not in errors
    collecting, training = errors.splitlines()
    assert collecting.startswith("error: model.path: a GPU of 1xH100 has 77.0 GiB to give and a worker needs 1")
    assert "131 GiB weights" in collecting and "one GPU has to hold a whole model" in collecting
    assert training.startswith("train.zero.offload: a GPU of 1xH100 has 77.0 GiB to give and a worker needs 1,")
    # With everything offloaded it would fit: 18 bytes a parameter, half as much again, in 2 TiB of host memory.
    assert training.endswith("set train.zero.offload=all")


def test_more_gpus_are_asked_for_where_nothing_else_helps(planned: Callable[..., Config]) -> None:
    config, machines = planned("70B", collect__gpus_per_worker=0), Machines.thought_of("8xH100")
    shape = read_shape(config)
    twice = replace(shape, parameters=2 * shape.parameters)  # offloaded, 3.5 TiB of a node with 2
    refusals = {r.setting: r.reason for r in refused_on(config, twice, machines)}
    assert refusals["train.workers"].endswith("set train.workers=64 on as many GPUs")
    offloaded = changed(config, {"train.zero.offload": "all"})
    refusals = {r.setting: r.reason for r in refused_on(offloaded, twice, machines)}
    assert refusals["train.zero.offload"].startswith("to train needs about 3,5")


def test_pipelined_rounds_need_the_gpus_of_both_stages(planned: Callable[..., Config]) -> None:
    config = planned("7B", overlap="pipelined")
    shape = read_shape(config)
    (refusal,) = refused_on(config, shape, Machines.thought_of("8xH100"))
    assert refusal.setting == "overlap" and "need 16 GPUs and 8xH100 has 8: set overlap=alternate" in refusal.reason
    assert not list(refused_on(config, shape, Machines.thought_of("16xH100")))
    assert not list(refused_on(planned("7B"), shape, Machines.thought_of("8xH100")))


@pytest.mark.parametrize(
    ("on", "changes", "setting"),
    [
        ("8xH100", {"train.gradient_checkpointing": False, "train.micro_batch_tokens": 16_384}, "train.gradient_checkpointing"),  # noqa: E501
        ("1xH100", {"train.workers": 1, "train.micro_batches_per_step": 1, "collect.workers": 1}, "train.zero.offload"),
        ("8xH100", {"train.micro_batch_tokens": 400_000}, "train.micro_batch_tokens"),
        ("8xH100", {"collect.forward_tokens": 400_000}, "collect.forward_tokens"),
        ("8xH100", {"collect.temperature": 0.8, "collect.forward_tokens": 65_536}, "collect.forward_tokens"),
        ("8xH100", {"collect.batch_prompts": 4096}, "collect.batch_prompts"),
        ("8xH100", {"evaluate.batch_prompts": 4096}, "evaluate.batch_prompts"),
    ],
)  # fmt: skip
def test_following_a_refusal_makes_it_go_away(
    planned: Callable[..., Config], on: str, changes: dict[str, Any], setting: str
) -> None:
    config, machines = changed(planned("7B"), changes), Machines.thought_of(on)
    shape = read_shape(config)
    (refusal,) = refused_on(config, shape, machines)
    assert refusal.setting == setting
    told = dict(word.split("=") for word in refusal.reason.rpartition(": set ")[2].split())
    assert setting in told
    values = {key: {"true": True}.get(value, int(value) if value.isdigit() else value) for key, value in told.items()}
    assert not list(refused_on(changed(config, values), shape, machines))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["collect.gpus_per_worker=1", "--on", "1xH100"], 1, "collect.workers: 2 workers with"),
        (["train.gpus_per_worker=1", "--on", "1xH100"], 1, "train.workers: 2 workers with"),
        (["collect.workers=100000"], 1, "collect.workers: to collect needs about"),
        (["train.workers=100000", "train.micro_batches_per_step=100000"], 1, "train.workers: to train needs about"),
        (["collect.max_new_tokens=2048"], 1, "collect.max_new_tokens: a response of 2048 tokens leaves no room"),
        (["evaluate.max_new_tokens=4096"], 1, "evaluate.max_new_tokens: a response of 4096 tokens"),
        (["prompts.per_round=1000000000"], 1, "prompts.per_round: the run needs about"),
        (["train.keep_checkpoints=100000000"], 1, "train.keep_checkpoints: the run needs about"),
        (["runs_dir=/proc/nowhere"], 1, "runs_dir: /proc/nowhere/tiny cannot be written"),
        (["store=/proc/nowhere"], 1, "store: /proc/nowhere cannot be written"),
        (["tracking.uri=mysql://me:secret@there/db"], 1, "tracking.uri: mysql://there/db needs the Python package"),
        (["store=gopher://there"], 1, "store: cannot open the store at gopher://there"),
        (["model.path=./nowhere"], 2, "model.path: no model at"),
        (["prompts.grader=none", "collect.responses=verified"], 2, "collect.responses=verified needs a grader"),
        (["--on", "8xP100"], 2, "--on '8xP100' is not of the form 8xH100"),
        (["--price-per-gpu-hour", "2"], 2, "--price-per-gpu-hour: the run uses no GPUs"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_clear_message(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    home = [] if any(a.startswith("runs_dir") for a in arguments) else [f"runs_dir={tmp_path / 'runs'}"]
    found, _, errors = plan(tmp_path, *home, *arguments)
    assert found == code
    assert errors.startswith(f"error: {message}") and "Traceback" not in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_every_reason_is_told_at_once(tmp_path: Path) -> None:
    code, _, errors = plan(tmp_path, "runs_dir=/proc/nowhere", "collect.max_new_tokens=2048", "collect.workers=100000")
    assert code == 1
    assert [line.removeprefix("error: ").split(":")[0] for line in errors.splitlines()] == [
        *("collect.max_new_tokens", "collect.workers", "runs_dir"),
    ]


def test_an_unreachable_mlflow_is_a_warning(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nothing answers there
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, shown, errors = plan(tmp_path, f"runs_dir={tmp_path / 'runs'}", f"tracking.uri={uri}")
    assert code == 0 and "Nothing speaks against this run" in shown
    assert errors.startswith(f"warning: tracking.uri: MLflow at {uri} does not answer")


def test_machines_thought_of() -> None:
    machines = Machines.thought_of("20xh200")
    assert (machines.gpus, machines.nodes, machines.gpu_bytes >> 30) == (20, 3, 139)
    with pytest.raises(ConfigError, match="0xH100"):
        Machines.thought_of("0xH100")


@pytest.mark.parametrize(("name", "on"), [("qwen2.5-coder-7b", "8xH100"), ("multi-node", "32xH100")])
def test_shipped_configurations_fit_the_machines_they_are_for(name: str, on: str) -> None:
    config, shape = load_config(Path(TINY).with_name(f"{name}.yaml")), shape_of(model_7b())
    assert not list(refused_on(config, shape, Machines.thought_of(on)))
    less = Machines.thought_of(f"{int(on.split('x')[0]) - 1}xH100")
    assert {r.setting for r in refused_on(config, shape, less)} == {"collect.workers", "train.workers"}
