"""Pipelined rounds, collectors that stay: the same results as stages that alternate, with processes that are kept."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray

from jf_cluster import pipeline
from jf_cluster.collect import collect_round
from jf_cluster.collect.collecting import Undertaking
from jf_cluster.collect.crew import ENDED_WITHIN_S, Crew, WorkerModels
from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.collect.worker import Collector, Counts
from jf_cluster.config import Config
from jf_cluster.evaluate.evaluating import evaluate_round
from jf_cluster.models import ModelError, model_hash
from jf_cluster.pipeline import collect_and_train
from jf_cluster.tracking import Tracker
from jf_cluster.tracking.activity import read_activity
from jf_cluster.train import TrainingError, train_round
from jf_cluster.train.steps_log import read_steps
from tests.flow.conftest import chain_command, run, save_model, small_config, stopped_when
from trajectory_store import TrajectoryStore
from trajectory_store.order import global_order

pytestmark = pytest.mark.usefixtures("local_ray")


class Patient(Collector):
    """Does not come to an end before the first steps of training are done."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        steps = self.config.run_dir / "training" / "round-001.steps.jsonl"
        deadline = time.monotonic() + 240
        store = TrajectoryStore(self.config.store_url).round(self.round_number)
        while len(store.committed_ids()) >= 12 and not (steps.is_file() and steps.read_text()):
            if time.monotonic() > deadline:
                raise TimeoutError("no step of training was done while there were prompts left")
            time.sleep(0.1)
        return super().run(prompts)


class Failing(Collector):
    """Finds the disk full when some trajectories are written."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        if len(TrajectoryStore(self.config.store_url).round(self.round_number).committed_ids()) >= 8:
            raise OSError(28, "No space left on device")
        return super().run(prompts)


def configured(runs_dir: Path, model: Path, overlap: str) -> Config:
    return small_config(
        runs_dir,
        model,
        overlap=overlap,
        collect__cpus_per_worker=0.5,
        train={
            "workers": 1,
            "cpus_per_worker": 0.5,
            "steps": 6,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "micro_batch_tokens": 256,
            "packing_rows": 4,
            "checkpoint_every_steps": 2,
        },
    )


class Resting:
    """A job of nothing, on a host that holds memory, as one with a model does."""

    def __init__(self, models: WorkerModels) -> None:
        self.memory = b"x" * (200 << 20)

    def process_id(self) -> int:
        return os.getpid()


def test_who_is_dismissed_is_gone(tmp_path: Path, base_model: Path) -> None:
    """The ranks that come next find the memory free."""
    crew = Crew(small_config(tmp_path, base_model))
    hosts = [crew.start(Resting)[0] for _ in range(2)]
    processes = [psutil.Process(ray.get(host.call.remote("process_id"))) for host in hosts]
    for host in hosts:
        crew.rest(host)
    begun = time.monotonic()
    crew.dismiss()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert time.monotonic() - begun < ENDED_WITHIN_S, "seen, not waited out"


@pytest.fixture(scope="module")
def alternated(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> tuple[str, str]:
    """Content hash of the round and of the model that stages one after the other make."""
    config = configured(tmp_path_factory.mktemp("alternated"), base_model, "alternate")
    manifest = collect_round(config, 1, Tracker.open(config))
    train_round(config, 1, Tracker.open(config))
    return manifest.content_hash, model_hash(config.model_dir(1))


def made(config: Config) -> tuple[str, str]:
    return TrajectoryStore(config.store_url).round(1).manifest.content_hash, model_hash(config.model_dir(1))


def test_training_begins_while_collecting_goes_on_and_changes_nothing(
    alternated: tuple[str, str], tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, base_model, "pipelined")
    monkeypatch.setattr(pipeline, "collect_round", partial(collect_round, worker_class=Patient))
    crew = Crew(config)
    collect_and_train(config, 1, Tracker.open(config), crew)
    crew.dismiss()
    assert made(config) == alternated


def test_a_failure_of_collecting_stops_the_training_and_the_same_call_goes_on(
    alternated: tuple[str, str], tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, base_model, "pipelined")
    crew = Crew(config)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pipeline, "collect_round", partial(collect_round, worker_class=Failing))
        collect_and_train(config, 1, Tracker.open(config), crew)
    round_ = TrajectoryStore(config.store_url).round(1)
    assert not round_.is_sealed and 8 <= len(round_.committed_ids()) < 20
    collect_and_train(config, 1, Tracker.open(config), crew)
    crew.dismiss()
    assert made(config) == alternated


def test_a_failure_of_training_stops_the_collecting(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, base_model, "pipelined")
    round_ = TrajectoryStore(config.store_url).round(1)

    def fails(*_: object) -> None:
        while not round_.committed_ids():
            time.sleep(0.05)
        raise TrainingError("no")

    monkeypatch.setattr(pipeline, "train_round", fails)
    monkeypatch.setattr(pipeline, "collect_round", partial(collect_round, worker_class=Patient))
    crew = Crew(config)
    with pytest.raises(TrainingError):
        collect_and_train(config, 1, Tracker.open(config), crew)
    crew.dismiss()
    assert not round_.is_sealed


class Held(Collector):
    """Keeps the prompts that the first epoch takes last until it may go on."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        place = self.config.runs_dir.parent
        is_last = any(prompt.prompt_id in (place / "last").read_text() for prompt in prompts)
        deadline = time.monotonic() + 240
        while is_last and not (place / "go").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the rest was not wanted")
            time.sleep(0.1)
        return super().run(prompts)


HELD = """
from functools import partial
from pathlib import Path

import typer

from jf_cluster import pipeline
from jf_cluster.collect import collect_round
from jf_cluster.command import run
from tests.flow.test_pipelined import Held

def main(config: Path) -> None:
    run(config, None, lambda rounds: rounds.train(1))

pipeline.collect_round = partial(collect_round, worker_class=Held)
typer.run(main)
"""


@pytest.mark.slow
def test_a_pipelined_round_that_is_killed_and_stopped_in_the_middle_ends_as_if_it_had_not_been(
    alternated: tuple[str, str], tmp_path: Path, base_model: Path
) -> None:
    config = configured(tmp_path / "runs", base_model, "pipelined")
    command = [sys.executable, "-c", HELD, chain_command(config)[-1]]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    steps, said = config.run_dir / "training" / "round-001.steps.jsonl", tmp_path / "said"
    round_ = TrajectoryStore(config.store_url).round(1)
    ids = sorted(Undertaking.of(config, 1).prompts.ids().to_pylist())
    (tmp_path / "last").write_text(" ".join(ids[row] for row in global_order(20, config.seed, 0)[-4:]))

    stopped_when(
        lambda: steps.is_file() and bool(read_steps(steps)) and len(round_.shard_names()) == 4,
        *(signal.SIGKILL, command, said),
        **address,
    )
    # What is there is enough for all steps: the training comes to its end while prompts are left.
    exported, since = config.run_dir / "models" / ".round-001.partial" / "model.safetensors", time.time()

    def has_trained() -> bool:
        begun = any(now.stage == "train" and now.begun > since for now in read_activity(config.run_dir))
        return begun and exported.exists()

    assert stopped_when(has_trained, signal.SIGTERM, command, said, **address) == 143, said.read_text()
    assert "the same command carries on" in said.read_text()
    assert len(round_.committed_ids()) == 16 and not round_.is_sealed
    assert not Path(config.model_dir(1)).exists()
    (tmp_path / "go").touch()
    done = run(*command, **address)
    assert done.returncode == 0, done.stderr
    assert made(config) == alternated


class Telling(Collector):
    """Writes down which process it runs in, and begins when as many have as there are workers."""

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        (self.config.run_dir / f"pid-{os.getpid()}-{self.round_number}").touch()
        deadline = time.monotonic() + 120
        while len(list(self.config.run_dir.glob(f"pid-*-{self.round_number}"))) < self.config.collect.workers:
            if time.monotonic() > deadline:
                raise TimeoutError("the other worker was not given a batch")
            time.sleep(0.05)
        return super().run(prompts)


@pytest.mark.parametrize("responses", [pytest.param("base", marks=pytest.mark.slow), "self"])
def test_collectors_take_over_a_new_model_without_being_restarted(
    tmp_path: Path, base_model: Path, responses: str
) -> None:
    def prepared(name: str, workers: int) -> Config:
        config = small_config(
            tmp_path / name, base_model, collect__responses=responses, collect__workers=workers,
            collect__cpus_per_worker=0.5,
        )  # fmt: skip  # half a CPU: both crews work at once
        for number in (1, 2):
            save_model(Path(config.model_dir(number)), seed=number)
        return config

    fresh, kept = prepared("fresh", 1), prepared("kept", 2)
    crew = Crew(kept)
    for round_number in (1, 2, 3):
        apart = collect_round(fresh, round_number, Tracker.open(fresh))
        together = collect_round(kept, round_number, Tracker.open(kept), worker_class=Telling, crew=crew)
        assert together.content_hash == apart.content_hash
        if round_number == 1:
            evaluated = evaluate_round(kept, 0, Tracker.open(kept), crew)
            assert evaluated.ar.accuracy is not None
    crew.dismiss()
    pids = [{p.name.split("-")[1] for p in kept.run_dir.glob(f"pid-*-{number}")} for number in (1, 2, 3)]
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == 2


def test_another_model_than_the_rounds_is_refused(tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, collect__workers=1)
    save_model(Path(config.model_dir(1)), seed=1)

    class Swapped(Crew):
        """The model changes hands between the driver's look at it and the worker's."""

        def start(self, *arguments: object):  # type: ignore[no-untyped-def,override]
            save_model(Path(config.model_dir(1)), seed=2)
            return super().start(*arguments)  # type: ignore[arg-type]

    with pytest.raises(ModelError, match="with which round 2 was begun"):
        collect_round(config, 2, Tracker.open(config), crew=Swapped(config))
