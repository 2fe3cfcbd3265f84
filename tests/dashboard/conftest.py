"""A finished run of two rounds, written by hand through the project's own writers: no Ray, no training, seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jf_cluster.config import Config
from jf_cluster.dashboard import show
from jf_cluster.evaluate import looking
from jf_cluster.evaluate.evaluation import Evaluation, ModeResult, judge, save_evaluation
from jf_cluster.evaluate.looking import BLOCK_SIZES, BLOCKS, Look
from jf_cluster.jacobi.calibration import Measured
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.watching import Forward, Watched
from jf_cluster.model_card import write_card
from jf_cluster.tracking import Tracker
from trajectory_store import Provenance, Trajectory, TrajectoryStore

BLOCK = 8
TOKENS = 32


def evaluation(round_number: int, tpf: float, accuracy: float, base_accuracy: float = 0.9) -> Evaluation:
    passed, reason = judge(accuracy, base_accuracy, 0.02)

    def mode(factor: float) -> ModeResult:
        acceptance = (1.0, *[(factor - 1) / 4] * 4)
        return ModeResult(accuracy=accuracy, tpf=factor, tps=400.0 * factor, same_as_ar=1.0, acceptance=acceptance)

    return Evaluation(
        round=round_number, model_hash=f"{round_number}" * 64, prompts=100, rejected=0, speed_prompts=4,
        ar=mode(1.0), jacobi=mode(tpf), multiblock=mode(tpf + 0.1), agreement_with_base=0.95,
        responses_same_as_base=0.9, unfinished=0, accuracy_drop=base_accuracy - accuracy, passed=passed,
        reason=reason, seconds=1.0, responses={},
    )  # fmt: skip


def trajectory(prompt_id: str, per_pass: int) -> Trajectory:
    """A response whose every block gains ``per_pass`` tokens a pass."""
    response = np.arange(10, 10 + TOKENS, dtype=np.int32)
    accepted = np.arange(0, BLOCK, per_pass, dtype=np.int32)
    blocks = TOKENS // BLOCK
    tails = [np.full(BLOCK - a, 5, np.int32) for a in accepted]
    return Trajectory(
        prompt_id, response[:4], response, True, np.full(blocks, len(accepted), np.int32),
        np.tile(accepted, blocks), np.concatenate(tails * blocks),
    )  # fmt: skip


def look(round_number: int, run: int) -> Look:
    def watched(mode: str) -> Watched:
        starts = range(1, TOKENS, run)
        forwards = tuple(
            Forward(at, BLOCK + 4, BLOCK, min(run, TOKENS - at), mode == "multiblock" and run > 1) for at in starts
        )
        return Watched(Drafting(mode, BLOCK), tuple(range(TOKENS)), forwards)

    grid = [Measured(AUTOREGRESSIVE, 1.0, 1.0, 0.002, 500.0)] + [
        Measured(looking._setting(n, k), run, n, 0.003, 100.0 * n + k) for n in BLOCK_SIZES for k in BLOCKS
    ]
    words = tuple(f" word{i}" for i in range(TOKENS))
    return Look(round_number, "How many?", words, watched("jacobi"), watched("multiblock"), tuple(grid))


def export(config: Config, round_number: int, content: int | None = None) -> None:
    """Put a model where a round exports it; ``content``, by default the round's number, tells it from another one."""
    content = round_number if content is None else content
    directory = Path(config.model_dir(round_number))
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes([content]))
    made = {"model_hash": f"{content}" * 64, "trajectories_content_hash": f"t{content}"}
    lineage = made | {"parent_model_hash": "p", "base_model_hash": "b"}
    (directory / "lineage.json").write_text(json.dumps(lineage))
    write_card(directory, base="tiny", dtype="float32", round_number=round_number)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Tracker]:
    config = Config.model_validate(
        {"name": "pictures", "runs_dir": tmp_path_factory.mktemp("runs"), "rounds": 2, "tracking": {"uri": None}}
    )
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    store = TrajectoryStore(config.store_url)
    with Tracker.open(config) as tracker:
        for r in range(3):
            provenance = Provenance(f"{r}" * 64, "t" * 64, BLOCK, seed=0, round_number=r + 1, code_version="0")
            with tracker.stage(r + 1, "collect") as stage, store.round(r + 1).writer(provenance) as writer:
                for row in range(5):
                    writer.append(trajectory(f"prompt-{row}", per_pass=1 + r))
                    stage.metrics({"response_tokens_per_s": 100.0 * row, "prompts_done": row}, step=row)
            manifest = store.round(r + 1).seal(provenance)
            if r:
                with tracker.stage(r, "train") as stage:
                    for step in range(1, 21):
                        values = {"train/loss": 5 / step, "train/learning_rate": 1e-3, "train/tokens_per_s": 5000.0}
                        stage.metrics(values, step=step)
                    stage.tags({"store_hash": manifest.content_hash})
                export(config, r)
            with tracker.stage(r, "evaluate"):
                save_evaluation(config, evaluation(r, 1.1 + r, 0.9 - 0.01 * r))
                looking._path(config, r).write_bytes(looking._FILE.dump_json(look(r, 1 + r)))
            show(config, tracker)
    return config, tracker
