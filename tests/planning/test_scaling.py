"""docs/scaling.md and the code say the same, and the formulas give what a calculation by hand gives."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from jf_cluster.config import load_config
from jf_cluster.planning import speed
from jf_cluster.planning.estimate import Rates, stages, together_s
from jf_cluster.planning.fitting import changed
from jf_cluster.planning.scaling import ROUND_TOKENS, STEP_TOKENS, Plan, plans, tables
from jf_cluster.planning.speed import ASSUMED

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def every() -> dict[tuple[str, int], Plan]:
    return {(p.model, p.gpus): p for p in plans()}


@pytest.mark.parametrize("name", tables())
def test_the_page_holds_the_table(name: str) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert tables()[name] in page, "make it again: python -m jf_cluster plan --scaling"


def test_every_assumption_is_on_the_page() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"`{field.name}`" in page for field in fields(ASSUMED))


def test_the_plans_are_those_of_the_shipped_configuration(every: dict[tuple[str, int], Plan]) -> None:
    shipped, planned = load_config(ROOT / "configs" / "qwen2.5-coder-7b.yaml"), every["7B", 8].config
    assert (planned.collect, planned.train) == (shipped.collect, shipped.train.model_copy(update={
        "cpus_per_worker": 1.0, "warmup_steps": 20,
    }))  # fmt: skip
    timed = {"prompts", "speed_prompts", "batch_prompts", "max_new_tokens", "decoding"}
    assert planned.evaluate.model_dump(include=timed) == shipped.evaluate.model_dump(include=timed)
    assert (planned.prompts.per_round, planned.rounds) == (shipped.prompts.per_round, shipped.rounds)
    for plan in every.values():
        tokens = (
            plan.config.train.steps * plan.config.train.micro_batches_per_step * plan.config.train.micro_batch_tokens
        )
        assert 0.99 * ROUND_TOKENS < tokens <= ROUND_TOKENS


def test_training_by_hand(every: dict[tuple[str, int], Plan]) -> None:
    multiplied, parameters = 7_070_619_136, 7_615_616_512
    token = 4 * (2 * multiplied + 4 * 28 * 3584 * 400)  # checkpointed: 4 passes; 400 keys on average
    compute_s = 32_768 * 0.97 * token / (989e12 * 0.4)
    for gpus, bandwidth in ((8, 450e9), (64, 400e9), (512, 400e9)):
        network_s = 6 * parameters * (gpus - 1) / gpus / (bandwidth * 0.8) + 3 * 28 * (gpus - 1) * 4e-6
        found = every["7B", gpus].training
        assert (found.compute_s, found.network_s) == (pytest.approx(compute_s), pytest.approx(network_s))
        assert found.tokens_per_s == pytest.approx(gpus * 32_768 * 0.97 / compute_s)


def test_collecting_by_hand(every: dict[tuple[str, int], Plan]) -> None:
    found = every["7B", 8].collecting
    read = 2 * 7_070_619_136 + 128 * 500 * 57_344
    forward_s = max(read / (3.35e12 * 0.6), 28 * 0.35e-3)
    assert found.decoding == pytest.approx(128 * 600 / (1200 * forward_s))
    flops = (1 + 1 / 3 + 6.7) * (2 * 7_070_619_136 + 4 * 28 * 3584 * 500)
    assert found.tracing == pytest.approx(989e12 * 0.4 / flops)
    assert found.tokens_per_s == found.tracing, "the newest model writes what it iterates towards"
    other = replace(found, one_pass=False)
    assert other.tokens_per_s == pytest.approx(found.decoding * found.tracing / (found.decoding + found.tracing))


def test_rates_by_hand(every: dict[tuple[str, int], Plan]) -> None:
    plan, parameters = every["7B", 64], 7_615_616_512
    rates = plan.rates
    load_s = 8 * 2 * parameters / 10e9
    assert rates.collect_once == pytest.approx(load_s)
    assert rates.collect_prompt == pytest.approx(600 / (64 * plan.collecting.tokens_per_s))
    assert rates.train_once == pytest.approx(load_s + 3 * 14 * parameters / 10e9 + 2 * parameters / 2e9)
    alone_s, seven_s = (max((2 * 7_070_619_136 + n * 500 * 57_344) / (3.35e12 * 0.6), 28 * 0.35e-3) for n in (1, 7))
    assert 400 * rates.evaluate_prompt == pytest.approx(3 * (1200 * seven_s + 24 * 600 * alone_s))


def test_where_the_network_takes_over(every: dict[tuple[str, int], Plan]) -> None:
    for plan in every.values():
        for factor, slower in ((0.9, "network"), (1.1, "arithmetic")):
            tokens = int(factor * plan.training.hidden_tokens / ASSUMED.packing)
            found = speed.training(
                changed(plan.config, {"train.micro_batch_tokens": tokens}), plan.shape, plan.machines
            )
            assert (found.network_s > found.compute_s) == (slower == "network")
    assert every["7B", 512].training.hidden_tokens > STEP_TOKENS / 512, "as the page says"


def test_stages_of_a_run(every: dict[tuple[str, int], Plan]) -> None:
    config = every["7B", 8].config
    rates = Rates(10.0, 0.01, 100.0, 2.0, 5.0, 0.5)
    collect, train, evaluate = stages(config, rates)
    assert (collect.count, train.count, evaluate.count) == (3, 2, 3)
    assert collect.total_s == 3 * (10 + 450_000 * 0.01)
    assert train.total_s == 2 * (100 + 10_000 * 2)
    assert evaluate.total_s == 3 * (5 + 400 * 0.5)
    every_stage = [collect, train, evaluate]
    assert together_s(config, every_stage) == collect.total_s + train.total_s + evaluate.total_s
    pipelined = config.model_copy(update={"overlap": "pipelined"})
    assert train.seconds > collect.seconds, "so all but the last collecting is hidden"
    assert together_s(pipelined, every_stage) == collect.seconds + train.total_s + evaluate.total_s


def test_assumptions_move_what_they_should(every: dict[tuple[str, int], Plan]) -> None:
    plan = every["7B", 64]
    slow = replace(ASSUMED, network_share=0.001)
    assert speed.training(plan.config, plan.shape, plan.machines, slow).step_s > 10 * plan.training.step_s
    faster = speed.collecting(plan.config, plan.shape, plan.machines, 1, replace(ASSUMED, noisy_tokens=2.8))
    assert faster.tracing > 1.9 * plan.collecting.tracing and faster.decoding == plan.collecting.decoding
