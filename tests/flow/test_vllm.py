"""Responses written by vLLM: a stand-in with its documented interface writes with transformers' own greedy search."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jf_cluster.collect.collecting import Undertaking
from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.worker import Collector
from jf_cluster.config import Config
from jf_cluster.jacobi.responses import generate_responses
from jf_cluster.jacobi.sampling import Sampling
from jf_cluster.jacobi.vllm_responses import UnsupportedSamplingError, VllmWriter
from jf_cluster.models import ModelError
from tests.flow.conftest import save_model, small_config
from trajectory_store import TrajectoryStore

END = 1


@dataclass(frozen=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


class LLM:
    """Greedy search over one prompt after the other; a stop token is among the tokens or only told, as versions do."""

    keeps_stop_token = True
    loaded = 0

    def __init__(self, *, model: str, dtype: str, max_model_len: int, **_: object) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.longest = max_model_len
        type(self).loaded += 1

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling: SamplingParams, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        assert sampling.temperature == 0
        return [SimpleNamespace(outputs=[self._written(p["prompt_token_ids"], sampling)]) for p in prompts]

    def _written(self, prompt: list[int], sampling: SamplingParams) -> SimpleNamespace:
        assert len(prompt) + sampling.max_tokens <= self.longest
        out = self.model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sampling.stop_token_ids,
        )
        tokens = out[0, len(prompt) :].tolist()
        if tokens[-1] not in sampling.stop_token_ids:
            return SimpleNamespace(token_ids=tokens, finish_reason="length", stop_reason=None)
        told = tokens if self.keeps_stop_token else tokens[:-1]
        return SimpleNamespace(token_ids=told, finish_reason="stop", stop_reason=tokens[-1])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    module = ModuleType("vllm")
    engine = type("LLM", (LLM,), {})
    module.LLM, module.SamplingParams = engine, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return engine


def configured(tmp_path: Path, base_model: Path, generator: str) -> Config:
    config = small_config(
        tmp_path / generator, base_model, collect__generator=generator, collect__gpus_per_worker=1, collect__workers=1
    )
    save_model(Path(config.model_dir(1)), seed=1)
    return config


def trajectories(config: Config, models: WorkerModels) -> list[str]:
    """What two rounds' collectors of one process commit, as content hashes."""
    found = []
    for round_number in (1, 2):
        undertaking = Undertaking.of(config, round_number)
        collector = Collector(config, round_number, undertaking.provenance, "w", models)
        collector.run(undertaking.prompts[:6])
        collector.finish()
        found.append(TrajectoryStore(config.store_url).round(round_number).seal(undertaking.provenance).content_hash)
    return found


@pytest.mark.parametrize("keeps_stop_token", [True, False])
def test_trajectories_are_those_of_the_builtin_generator(
    tmp_path: Path, base_model: Path, vllm: type[LLM], keeps_stop_token: bool
) -> None:
    vllm.keeps_stop_token = keeps_stop_token
    builtin, other = (configured(tmp_path, base_model, generator) for generator in ("builtin", "vllm"))
    assert trajectories(other, WorkerModels(other)) == trajectories(builtin, WorkerModels(builtin))
    assert vllm.loaded == 1, "an engine serves all rounds"


@pytest.mark.parametrize("keeps_stop_token", [True, False])
def test_the_end_token_is_part_of_a_finished_response(
    base_model: Path, vllm: type[LLM], keeps_stop_token: bool
) -> None:
    vllm.keeps_stop_token = keeps_stop_token
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    prompts = [np.array([5, 9, 30]), np.array([7, 8])]
    (endless, _) = generate_responses(model, prompts, max_new_tokens=12, end_ids=[END])
    ends = [END, int(endless.tokens[5])]
    expected = generate_responses(model, prompts, max_new_tokens=12, end_ids=ends)
    written = VllmWriter(base_model, dtype="float32", context=64)(prompts, max_new_tokens=12, end_ids=ends)
    assert expected[0].finished and len(expected[0].tokens) <= 6
    for one, other in zip(written, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.finished == other.finished


def test_no_vllm_is_a_clear_error(tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = configured(tmp_path, base_model, "vllm")
    with pytest.raises(ModelError, match=r"vLLM cannot be imported .*install the vllm extra"):
        WorkerModels(config).base_writer()


def test_vllm_writes_greedily_only(base_model: Path, vllm: type[LLM]) -> None:
    writer = VllmWriter(base_model, dtype="float32", context=64)
    with pytest.raises(UnsupportedSamplingError, match="greedily"):
        writer([], max_new_tokens=4, end_ids=[END], sampling=Sampling(0.7))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"collect__responses": "self"}, "responses=base"),
        ({"collect__temperature": 0.5}, "temperature=0"),
        ({"collect__gpus_per_worker": 0}, "gpus_per_worker=1"),
    ],
)
def test_what_vllm_cannot_do_is_refused(
    tmp_path: Path, base_model: Path, settings: dict[str, object], named: str
) -> None:
    wanted = {"collect__generator": "vllm", "collect__gpus_per_worker": 1} | settings
    with pytest.raises(ValueError, match=named):
        small_config(tmp_path, base_model, **wanted)
