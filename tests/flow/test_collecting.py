"""A round is collected whole and once, whatever happens to its workers."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ray

from jf_cluster.collect.prompts import PromptsError, load_prompts
from jf_cluster.collect.worker import Collector
from jf_cluster.config import Config
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.models import end_ids, load_model, load_tokenizer, model_hash
from tests.flow.conftest import chain_command, collected, run, small_config, stopped_when
from tests.flow.faulty import Failing, FullDisk, HungOnce, KilledOnce, Poisoned
from trajectory_store import ProvenanceMismatchError, TrajectoryStore
from trajectory_store.__main__ import main

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_round_holds_the_models_own_responses(reference) -> None:
    config, manifest = reference
    tokenizer, model = load_tokenizer(config), load_model(config, 0)
    prompts = load_prompts(config, tokenizer, 1)
    reader = TrajectoryStore(config.store_url).round(1).reader()
    assert {reader[i].prompt_id for i in range(len(reader))} == {p.prompt_id for p in prompts}
    assert manifest.rows == 20 and manifest.rejects == 0
    assert manifest.provenance.model_hash == model_hash(config.model_dir(0))
    ends = end_ids(model, tokenizer)
    for prompt in prompts:
        (expected,) = generate_responses(model, [prompt.tokens], max_new_tokens=20, end_ids=ends)
        row = reader.find(prompt.prompt_id)
        assert np.array_equal(row.prompt, prompt.tokens) and np.array_equal(row.response, expected.tokens)
        assert np.array_equal(row.iterate(0, int(row.iterations[0]), 8), expected.tokens[:8])


def test_a_sealed_round_is_not_collected_again(reference) -> None:
    config, manifest = reference
    assert collected(config, worker_class=Poisoned) == manifest


def test_other_batches_and_workers_give_the_same_content(reference, tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, collect__workers=1, collect__batch_prompts=7)
    assert collected(config).content_hash == reference[1].content_hash


def test_a_killed_worker_loses_and_doubles_nothing(reference, tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, collect__commit_every_s=1e6, collect__batch_prompts=2)
    manifest = collected(config, worker_class=KilledOnce)
    assert (tmp_path / "killed").exists()
    assert manifest.content_hash == reference[1].content_hash and manifest.rejects == 0
    attempt = json.loads((config.run_dir / "collecting" / "round-001.json").read_text())["attempts"][0]
    assert attempt["workers_replaced"] == 1 and attempt["retries"] > 0 and attempt["rejects"] == 0


@pytest.mark.parametrize("worker_class", [Poisoned, Failing])
def test_a_poisoned_prompt_is_isolated_and_rejected(
    reference, tmp_path: Path, base_model: Path, worker_class: type[Collector]
) -> None:
    config = small_config(tmp_path, base_model, collect__batch_prompts=10, collect__workers=1)
    poison = load_prompts(config, load_tokenizer(config), 1)[3].prompt_id
    (tmp_path / "poison").write_text(poison)
    manifest = collected(config, worker_class=worker_class)
    rejects = TrajectoryStore(config.store_url).round(1).rejects()
    assert rejects.keys() == {poison} and "failed 3 times" in rejects[poison]
    assert manifest.rows == 19 and manifest.rejects == 1
    if worker_class is Failing:
        assert "this prompt is bad" in rejects[poison]


def test_a_hung_worker_is_replaced(reference, tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, collect__batch_timeout_s=20)
    assert collected(config, worker_class=HungOnce).content_hash == reference[1].content_hash


def test_a_full_disk_stops_the_run(tmp_path: Path, base_model: Path) -> None:
    config = small_config(tmp_path, base_model, collect__workers=1)
    with pytest.raises(OSError, match="No space left"):
        collected(config, worker_class=FullDisk)
    assert not TrajectoryStore(config.store_url).round(1).is_sealed


def test_a_half_collected_round_is_finished_from_where_it_stopped(reference, tmp_path: Path, base_model: Path) -> None:
    """What an interrupted driver leaves is a round without a seal; here it lacks some of its shards as well."""
    config, manifest = reference
    again = small_config(tmp_path, base_model)
    shutil.copytree(config.run_dir, again.run_dir)
    folder = Path(again.store_url) / "round-001"
    (folder / "manifest.json").unlink()
    shards = sorted(folder.glob("shard-*"))
    for shard in shards[:3]:
        shard.unlink()
    kept = TrajectoryStore(again.store_url).round(1).committed_ids()
    assert 0 < len(kept) < 20
    assert collected(again).content_hash == manifest.content_hash
    assert set(shards[3:]) <= set(folder.glob("shard-*"))


def test_a_round_that_was_removed_is_collected_as_if_it_had_never_been(
    reference, tmp_path: Path, base_model: Path
) -> None:
    config, (_, manifest) = small_config(tmp_path, base_model, collect__workers=1), reference
    summary = config.run_dir / "collecting" / "round-001.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"seconds": 1e6, "attempts": [{"seconds": 1e6}]}))
    assert collected(config).content_hash == manifest.content_hash
    kept = json.loads(summary.read_text())
    assert len(kept["attempts"]) == 1 and kept["seconds"] < 1e6


def test_sigterm_while_collecting_loses_nothing_and_the_same_command_goes_on(
    reference, tmp_path: Path, base_model: Path
) -> None:
    config = small_config(tmp_path / "runs", base_model, collect__batch_prompts=1)
    command, round_ = chain_command(config, "collect"), TrajectoryStore(config.store_url).round(1)
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    code = stopped_when(lambda: bool(round_.shard_names()), signal.SIGTERM, command, tmp_path / "said", **address)
    kept = set(round_.committed_ids())
    assert code == 143 and 0 < len(kept) < 20 and not round_.is_sealed, (tmp_path / "said").read_text()
    done = run(*command, **address)
    assert done.returncode == 0, done.stderr
    assert f"{20 - len(kept)} prompts, " in done.stderr, "only what was missing"
    assert round_.manifest.content_hash == reference[1].content_hash


def test_too_long_prompts_are_rejected_with_the_reason(tmp_path: Path, base_model: Path) -> None:
    rows = [{"question": f"What is {i} plus {i}? " * (60 if i % 3 == 0 else 1)} for i in range(60)]
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    prompts = {"source": str(source), "per_round": 20, "held_out": 1}
    config = small_config(tmp_path, base_model, prompts=prompts, collect__workers=1)
    manifest = collected(config)
    reasons = TrajectoryStore(config.store_url).round(1).rejects().values()
    assert manifest.rejects == len(reasons) > 0 and manifest.rows == 20 - len(reasons)
    assert all("do not fit the model's context of 256" in reason for reason in reasons)


def test_another_models_trajectories_are_never_mixed_in(reference, tmp_path: Path, other_model: Path) -> None:
    config = small_config(tmp_path, other_model, collect__workers=1)
    shutil.copytree(reference[0].run_dir, config.run_dir)
    (Path(config.store_url) / "round-001" / "manifest.json").unlink()
    with pytest.raises(ProvenanceMismatchError, match="model_hash"):
        collected(config)


class TestWhoseResponses:
    """In round 2 the newest model is another one than the base."""

    @pytest.fixture
    def second(
        self, reference, tmp_path: Path, base_model: Path, other_model: Path, request: pytest.FixtureRequest
    ) -> Config:
        changes = {"collect__responses": request.param, "prompts__fresh": False, "collect__workers": 1}
        config = small_config(tmp_path, base_model, **changes)
        shutil.copytree(reference[0].run_dir, config.run_dir)
        shutil.copytree(other_model, config.model_dir(1))
        collected(config, 2)
        return config

    @staticmethod
    def responses(config: Config, round_number: int) -> dict[str, list[int]]:
        reader = TrajectoryStore(config.store_url).round(round_number).reader()
        return {reader[i].prompt_id: reader[i].response.tolist() for i in range(len(reader))}

    @staticmethod
    def reused(config: Config) -> int:
        attempts = json.loads((config.run_dir / "collecting" / "round-002.json").read_text())["attempts"]
        return sum(attempt["reused"] for attempt in attempts)

    @pytest.mark.parametrize("second", ["base"], indirect=True)
    def test_base(self, second: Config) -> None:
        assert self.responses(second, 2) == self.responses(second, 1) and self.reused(second) == 20
        first, newest = (TrajectoryStore(second.store_url).round(r).manifest for r in (1, 2))
        assert newest.iterations != first.iterations, "the trajectories are the newest model's"

    @pytest.mark.parametrize("second", ["self"], indirect=True)
    def test_self(self, second: Config) -> None:
        assert self.responses(second, 2) != self.responses(second, 1) and self.reused(second) == 0

    @pytest.mark.parametrize("second", ["verified"], indirect=True)
    def test_verified(self, second: Config) -> None:
        # A random model is never right, so all responses fall back to the base's.
        assert self.responses(second, 2) == self.responses(second, 1) and self.reused(second) == 20


def test_no_prompt_that_can_be_decoded_is_an_error(tmp_path: Path, base_model: Path) -> None:
    from jf_cluster.collect import CollectError

    config = small_config(tmp_path, base_model, collect__max_new_tokens=250, collect__workers=1)
    with pytest.raises(CollectError, match=r"none of the 20 prompts.*rejects --retry .*/store/round-001$") as raised:
        collected(config)
    assert not TrajectoryStore(config.store_url).round(1).is_sealed
    assert main(str(raised.value).split("python -m trajectory_store ")[1].split()) == 0
    config = small_config(tmp_path, base_model, collect__workers=1)
    assert collected(config).rejects == 0


def test_too_few_prompts_are_told_before_anything_starts(tmp_path: Path, base_model: Path) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(json.dumps({"question": f"question {i}"}) for i in range(10)))
    config = small_config(tmp_path, base_model, prompts={"source": str(source), "per_round": 20, "held_out": 1})
    with pytest.raises(PromptsError, match="needs 20 distinct training prompts"):
        collected(config)
