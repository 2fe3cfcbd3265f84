"""The models of a run in MLflow's registry: one version a round, `round-N` aliases, and `champion` on the best.

A round that was made again has a new version, which its alias moves to. Everything is derived from the run's outputs,
so registering again changes nothing, and a store that did not answer is caught up with at the next call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import MODES, Evaluation, evaluations_until
from jf_cluster.messages import first_line
from jf_cluster.model_card import CARD
from jf_cluster.tracking.store import (
    KEY,
    ROUND,
    SUPERSEDED_BY,
    client,
    copy_beside,
    experiment_name,
    is_server,
    refusals,
)
from jf_cluster.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

CHAMPION = "champion"
LINEAGE = ("parent_model_hash", "trajectories_content_hash", "base_model_hash")


def champion_of(evaluations: Sequence[Evaluation]) -> int | None:
    """Round of the best model: evaluated in this order, each takes the place when it passed the gate and is faster.

    Faster is more tokens per forward in its best mode, which unlike tokens per second does not depend on what else the
    machine was doing. None where no round beat the base (round 0).
    """
    best: Evaluation | None = None
    for evaluation in evaluations:
        if best is None or (evaluation.passed and fastest_tpf(evaluation) > fastest_tpf(best)):
            best = evaluation
    return None if best is None or best.round == 0 else best.round


def fastest_tpf(evaluation: Evaluation) -> float:
    """Tokens per forward of the evaluation's best mode."""
    return max(evaluation.mode(mode).tpf for mode in MODES)


def registered_name(config: Config) -> str:
    """Name of the run's models in the registry."""
    return config.tracking.registered_model or experiment_name(config).replace("/", "-")


def register(config: Config, tracker: Tracker, last_round: int) -> None:
    """Bring the registry up to what rounds 1 to ``last_round`` have put out; never fails because MLflow does."""
    found = evaluations_until(config, last_round)
    models = [e for e in found if e.round > 0 and Path(config.model_dir(e.round)).is_dir()]
    if not models or tracker.run_id is None:
        return
    try:
        mlflow, name = client(tracker.uri), registered_name(config)
        known = _versions(mlflow, name, tracker.run_key)
        for evaluation in models:
            before, tags = known.get(evaluation.round), _tags(config, tracker, evaluation)
            if before is not None and before.tags["model_hash"] == evaluation.model_hash:
                _retag(mlflow, before, tags)
                continue
            known[evaluation.round] = new = _new_version(mlflow, name, config, tracker, evaluation.round, tags)
            if before is not None:
                mlflow.set_model_version_tag(name, before.version, SUPERSEDED_BY, str(new.version))
        wanted = {f"round-{evaluation.round}": evaluation.round for evaluation in models}
        if (champion := champion_of(found)) is not None:
            wanted[CHAMPION] = champion
        mlflow.update_registered_model(name, _description(found, champion))
        present = mlflow.get_registered_model(name).aliases
        for alias, round_number in wanted.items():
            if str(present.get(alias)) != str(known[round_number].version):
                mlflow.set_registered_model_alias(name, alias, known[round_number].version)
                logger.info("models:/%s@%s is now model %d", name, alias, round_number)
    except refusals() as error:
        logger.warning("MLflow at %s: models are not registered (%s)", tracker.place, first_line(error))


_DESCRIPTION = """Models made by Jacobi Forcing, one version a round; {champion}.

| model | tokens per forward | speed-up | right answers | gate | hash |
| --- | --- | --- | --- | --- | --- |
{rows}
"""


def _description(evaluations: Sequence[Evaluation], champion: int | None) -> str:
    rows = [
        f"| {'base' if e.round == 0 else f'round {e.round}'} | {fastest_tpf(e):.2f} "
        f"| {max(e.speedup(mode) for mode in MODES):.2f} "
        f"| {'not graded' if e.ar.accuracy is None else f'{100 * e.ar.accuracy:.1f}%'} "
        f"| {'passed' if e.passed else 'failed'} | `{e.model_hash[:12]}` |"
        for e in evaluations
    ]
    told = "no round has beaten the base yet" if champion is None else f"round {champion} is the champion"
    return _DESCRIPTION.format(champion=told, rows="\n".join(rows))


def _versions(mlflow: MlflowClient, name: str, run_key: str) -> dict[int, ModelVersion]:
    """This run's newest versions by round; the registered model is made when there is none."""
    if not mlflow.search_registered_models(f"name = '{name}'"):
        mlflow.create_registered_model(name)
    versions = sorted(mlflow.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))
    return {int(v.tags[ROUND]): v for v in versions if v.tags.get(KEY) == run_key}


def _tags(config: Config, tracker: Tracker, evaluation: Evaluation) -> dict[str, str]:
    """What a version says of itself: whose model it is, what it comes from, and how good it is."""
    lineage = json.loads((Path(config.model_dir(evaluation.round)) / "lineage.json").read_text())
    return {
        KEY: tracker.run_key,
        ROUND: str(evaluation.round),
        "model_hash": evaluation.model_hash,
        "passed": str(evaluation.passed),
        "verdict": evaluation.reason,
        "tokens_per_forward": f"{fastest_tpf(evaluation):.3f}",
        **{key: str(lineage[key]) for key in LINEAGE},
    }


def _retag(mlflow: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    """Bring a version's tags up to date: its model may have been evaluated again."""
    for key, value in tags.items():
        if version.tags.get(key) != value:
            mlflow.set_model_version_tag(version.name, version.version, key, value)


def _new_version(
    mlflow: MlflowClient, name: str, config: Config, tracker: Tracker, round_number: int, tags: dict[str, str]
) -> ModelVersion:
    """A version that points at the export, or at a copy of it where the registry is a server that cannot see it."""
    directory = Path(config.model_dir(round_number))
    run_id = tracker.stage_run(round_number, "train")
    if is_server(tracker.uri) and run_id is not None:
        copy_beside(tracker.uri, run_id, directory, "model")
        source = f"{mlflow.get_run(run_id).info.artifact_uri}/model"
    else:
        source = directory.absolute().as_uri()
    return mlflow.create_model_version(
        name,
        source,
        run_id,
        tags=tags,
        description=(directory / CARD).read_text().split("---\n", 2)[-1],  # the card without its front matter
    )
