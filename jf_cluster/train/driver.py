"""The driver's side of training a round: check, start the ranks under Ray Train, follow them, publish the model."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather

from jf_cluster import __version__
from jf_cluster.config import Config
from jf_cluster.models import model_hash
from jf_cluster.stopping import Terminated, stops_through
from jf_cluster.tracking import StageRun, Tracker
from jf_cluster.train.checkpoints import whole_checkpoints
from jf_cluster.train.guard import Skip, read_skips
from jf_cluster.train.progress import followed
from jf_cluster.train.ranks import TrainingError, run_ranks
from jf_cluster.train.steps_log import read_steps
from jf_cluster.train.worker import RankJob
from jf_cluster.whole_files import write_whole
from trajectory_store import Manifest, Provenance, RoundNotSealedError, SealedRows, TrajectoryStore, without_secrets
from trajectory_store.local_files import sync
from trajectory_store.rows import digest_of, sorted_ids

logger = logging.getLogger(__name__)

_PLACEMENT = {
    *("workers", "cpus_per_worker", "gpus_per_worker", "max_restarts", "zero", "loss_chunk_tokens"),
    *("gradient_checkpointing", "checkpoint_every_steps", "checkpoint_every_s", "checkpoint_async", "keep_checkpoints"),
    *("guard", "export"),
}
"""Training settings that decide where and how safely the weights of each step are computed, not what they become."""


_PROMPT_IDS = ".prompts.arrow"

_COLLECTED = {"block_size", "max_new_tokens", "responses", "temperature"}
"""Settings of collecting that decide what the trajectories are."""


@dataclass(frozen=True)
class Arriving:
    """A round that is still being collected while it is trained on."""

    provenance: Provenance
    prompt_ids: pa.Array
    """Of every prompt of the round, strings in any order."""
    sealed: Callable[[], Manifest]
    """Waits for the end of the collecting."""


def train_round(config: Config, round_number: int, tracker: Tracker, arriving: Arriving | None = None) -> None:
    """Train model ``round_number`` from model ``round_number - 1`` on a round of trajectories: the sealed one, or the
    one that is ``arriving``, with the same result.

    Writes ``models/round-00r`` (published whole) and ``training/round-00r.json``; resumes from the round's last
    whole checkpoint; does nothing when the model is there already.

    Raises:
        TrainingError: the trajectories come from another model, or the ranks failed or went back more often than
            allowed.
        jf_cluster.stopping.Terminated: SIGTERM came; all that was done is in a checkpoint.
        jf_cluster.models.ModelError: the start model is missing or incomplete.
        trajectory_store.StoreError: the round is not sealed, or a shard is damaged.
    """
    target = Path(config.model_dir(round_number))
    if target.exists():
        return
    begun = time.monotonic()
    config = _anchored(config)
    inputs = _arriving_inputs(config, round_number, arriving) if arriving else _checked_inputs(config, round_number)
    name = target.name
    training, checkpoints = config.run_dir / "training", config.run_dir / "checkpoints" / name
    partial = target.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for directory in (training, checkpoints, target.parent):
        directory.mkdir(parents=True, exist_ok=True)
    made_before = (training / f"{name}.json").exists() and not whole_checkpoints(checkpoints)
    if made_before:
        _forget(training, name)
    job = RankJob(
        config_json=config.model_dump_json(),
        round_number=round_number,
        identity=_identity(config, round_number, inputs),
        checkpoints=str(checkpoints),
        steps_log=str(training / f"{name}.steps.jsonl"),
        skips=str(training / f"{name}.skipped.jsonl"),
        stop=str(stop_request(config, round_number)),
        export=str(partial),
        prompt_ids=_write_ids(arriving, training / f"{name}{_PROMPT_IDS}") if arriving else None,
    )
    what = "prompts that are being collected" if arriving else "trajectories"
    logger.info(
        "training round %d from model %d: %d %s, %d steps, %d ranks",
        *(round_number, round_number - 1, inputs.count, what, config.train.steps, config.train.workers),
    )
    earlier_s = sum(record.seconds for record in read_steps(Path(job.steps_log)))  # of an interrupted attempt
    with tracker.stage(round_number, "train", anew=made_before) as stage, stops_through(Path(job.stop)):
        stage.tags({"parent_model_hash": inputs.parent_hash})
        stage.params(config.train.of_round(round_number).model_dump(mode="json"))
        with followed(Path(job.steps_log), config.train.steps, f"train {name}", stage):
            _train_to_the_end(config, job, training / "ray", stage)
        trajectories = inputs.sealed().content_hash
        stage.tags({"store_hash": trajectories})
        made = model_hash(str(partial))
        _write_lineage(config, round_number, made, inputs.parent_hash, trajectories, partial)
        summary = _write_summary(config, job, training / f"{name}.json", earlier_s + time.monotonic() - begun)
        _publish(partial, target)
        stage.metrics({"train/stage_seconds": float(summary["seconds"])}, step=config.train.steps)
        stage.tags({"model_hash": made})
        stage.artifact(training / f"{name}.json")
    drop_leftovers(config)
    logger.info(
        "round %d trained: %d steps in %.0f s → %s", round_number, config.train.steps, summary["seconds"], target
    )


def _forget(training: Path, name: str) -> None:
    """Remove what is left of a training that came to its end and whose model was removed: it is made from nothing."""
    for path in training.glob(f"{name}.*"):
        path.unlink()


def stop_request(config: Config, round_number: int) -> Path:
    """A file that asks the ranks of a round to save and return after the step they are in."""
    return config.run_dir / "training" / f"{Path(config.model_dir(round_number)).name}.stop"


def drop_leftovers(config: Config) -> None:
    """Remove what a training needed on its way from rounds whose model is published.

    The next round starts from the export, and a checkpoint of ZeRO-3 is six times its size. A process killed right
    after publishing leaves it to the next.
    """
    for directory in (config.run_dir / "checkpoints").glob("round-*"):
        if (config.run_dir / "models" / directory.name).is_dir():
            shutil.rmtree(directory)
            (config.run_dir / "training" / f"{directory.name}{_PROMPT_IDS}").unlink(missing_ok=True)


def _anchored(config: Config) -> Config:
    """The configuration with absolute paths: Ray Train runs its workers in another directory."""
    anchored: dict[str, Any] = {"runs_dir": config.runs_dir.absolute()}
    if Path(config.model.path).is_dir():
        anchored["model"] = config.model.model_copy(update={"path": str(Path(config.model.path).absolute())})
    if config.store and "://" not in config.store:
        anchored["store"] = str(Path(config.store).absolute())
    return config.model_copy(update=anchored)


@dataclass(frozen=True)
class _Inputs:
    """What a round is trained from."""

    parent_hash: str
    """Content hash of the start model."""
    prompts_digest: str
    replayed: list[Manifest]
    """The earlier rounds that are trained on again."""
    own: int
    """The round's own trajectories, or the prompts that they will come from."""
    sealed: Callable[[], Manifest]

    @property
    def count(self) -> int:
        """All trajectories that are trained on."""
        return self.own + sum(manifest.rows for manifest in self.replayed)


def _checked_inputs(config: Config, round_number: int) -> _Inputs:
    """The start model and the sealed round, after its provenance was checked."""
    rows = SealedRows(TrajectoryStore(config.store_url).round(round_number))
    manifest = rows.reader.manifest
    parent_hash = _made_by_parent(config, round_number, manifest.provenance)
    if manifest.rows == 0:
        store = without_secrets(config.store_url)
        raise TrainingError(f"round {round_number} of {store} holds no trajectories: nothing to train on")
    replayed = _replayed(config, round_number, manifest.provenance)
    return _Inputs(parent_hash, rows.prompts_digest(), replayed, manifest.rows, lambda: manifest)


def _arriving_inputs(config: Config, round_number: int, arriving: Arriving) -> _Inputs:
    parent_hash = _made_by_parent(config, round_number, arriving.provenance)
    replayed = _replayed(config, round_number, arriving.provenance)
    return _Inputs(parent_hash, digest_of(arriving.prompt_ids), replayed, len(arriving.prompt_ids), arriving.sealed)


def _replayed(config: Config, round_number: int, provenance: Provenance) -> list[Manifest]:
    """The earlier rounds that are trained on again, which must be of the tokenizer of ``provenance``."""
    found = []
    for earlier in config.train.replayed(round_number):
        place = f"round {earlier} of {without_secrets(config.store_url)}"
        try:
            manifest = TrajectoryStore(config.store_url).round(earlier).manifest
        except RoundNotSealedError as error:
            raise TrainingError(
                f"{place} is not there or not sealed, and round {round_number} trains on it again "
                f"(train.replay_rounds={config.train.replay_rounds}): collect it, or lower train.replay_rounds"
            ) from error
        if manifest.provenance.tokenizer_hash != provenance.tokenizer_hash:
            raise TrainingError(
                f"{place} has another tokenizer than round {round_number}, which trains on it again: lower "
                "train.replay_rounds"
            )
        found.append(manifest)
    return found


def _made_by_parent(config: Config, round_number: int, provenance: Provenance) -> str:
    """Content hash of the start model, which must have made the trajectories."""
    parent_hash = model_hash(config.model_dir(round_number - 1))
    if provenance.model_hash != parent_hash:
        raise TrainingError(
            f"round {round_number} of {without_secrets(config.store_url)} was generated by model "
            f"{provenance.model_hash}, but training starts from {config.model_dir(round_number - 1)}, which is "
            f"{parent_hash}; collect the round again with that model, or point model.path at the one that made it"
        )
    return parent_hash


def _write_ids(arriving: Arriving, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In order and uncompressed: every rank maps it into memory as it is.
    table = pa.table({"prompt_id": sorted_ids(arriving.prompt_ids)})
    feather.write_feather(table, str(path), compression="uncompressed", chunksize=max(1, table.num_rows))
    return str(path)


def _identity(config: Config, round_number: int, inputs: _Inputs) -> str:
    """Canonical string of everything that shapes the weights: a checkpoint is resumed only under the same.

    The trajectories follow from the model, the prompts and the settings of collecting, so a round has the same
    identity before and after it is sealed.
    """
    parts = {
        "parent": inputs.parent_hash,
        "prompts": inputs.prompts_digest,
        "replayed": [manifest.content_hash for manifest in inputs.replayed],
        "collect": config.collect.model_dump(mode="json", include=_COLLECTED),
        "round": round_number,
        "seed": config.seed,
        "dtype": config.model.dtype,
        "noise": config.noise.model_dump(mode="json"),
        "train": config.train.of_round(round_number).model_dump(mode="json", exclude=_PLACEMENT, exclude_none=True),
    }
    return json.dumps(parts, sort_keys=True)


def _train_to_the_end(config: Config, job: RankJob, storage: Path, stage: StageRun) -> None:
    """Start the ranks, again whenever they went back to a checkpoint, until they have exported the model."""
    while not Path(job.export).exists():
        skips = read_skips(Path(job.skips), job.identity)
        if skips:
            _report_skips(config, job, skips, stage)
        run_ranks(config, job, storage)
        if Path(job.stop).exists():
            raise Terminated


def _report_skips(config: Config, job: RankJob, skips: list[Skip], stage: StageRun) -> None:
    last = skips[-1]
    samples = len({row for skip in skips for row in skip.rows})
    stage.metrics({"train/skips": len(skips), "train/skipped_samples": samples}, step=last.step)
    stage.tags({"skipped_samples": ", ".join(prompt_id for skip in skips for prompt_id in skip.prompt_ids)[:5000]})
    if len(skips) > config.train.guard.max_skips:
        raise TrainingError(
            f"training round {job.round_number} had to leave data out {len(skips)} times, the last time at step "
            f"{last.step + 1} ({last.reason}); so often the data are not the cause: start another run with a lower "
            f"train.learning_rate, or raise train.guard.max_skips. What was left out is in {job.skips}"
        )
    logger.warning(
        "step %d of round %d: %s; its %d samples are left out, training goes on from the last checkpoint (%s)",
        *(last.step + 1, job.round_number, last.reason, len(last.rows), job.skips),
    )


def _write_lineage(
    config: Config, round_number: int, made: str, parent_hash: str, trajectories: str, partial: Path
) -> None:
    lineage = {
        "model_hash": made,
        "base_model": config.model.path,
        "base_model_hash": model_hash(config.model.base),
        "parent_model_hash": parent_hash,
        "trajectories_content_hash": trajectories,
        "round": round_number,
        "jf_cluster": __version__,
        "config": config.shown(),
    }
    write_whole(partial / "lineage.json", json.dumps(lineage, indent=2) + "\n")


def _write_summary(config: Config, job: RankJob, path: Path, seconds: float) -> dict[str, float]:
    """Summary of the training; figures of the end are means over the last tenth of the steps."""
    records = read_steps(Path(job.steps_log))
    tail = records[-max(1, config.train.steps // 10) :]
    summary: dict[str, float] = {
        "round": job.round_number,
        "steps": config.train.steps,
        "skipped_samples": len({row for skip in read_skips(Path(job.skips), job.identity) for row in skip.rows}),
        "seconds": seconds,
        "step_seconds": sum(r.seconds for r in records),
        "tokens": sum(r.tokens for r in records),
        "epochs": tail[-1].epoch + 1,
        "loss": sum(r.loss for r in tail) / len(tail),
        "consistency": sum(r.consistency for r in tail) / len(tail),
        "ar": sum(r.ar for r in tail) / len(tail),
        "agreement": sum(r.agreement for r in tail) / len(tail),
        "fill": sum(r.fill for r in records) / len(records),
    }
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    return summary


def _publish(partial: Path, target: Path) -> None:
    """Flush everything under ``partial`` to disk and give it its name in one step."""
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    partial.rename(target)
    sync(target.parent)
