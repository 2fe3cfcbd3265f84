"""Collecting a round, seen from the driver: which prompts are left, who decodes them, and the seal at the end.

The store is the only record of what is done. A prompt whose trajectory is committed or that is rejected is skipped, so
the same call carries on after any interruption.
"""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ray import ObjectRef
from ray.actor import ActorHandle
from transformers import AutoConfig

from jf_cluster import __version__
from jf_cluster.collect.batches import batches_of, left_over
from jf_cluster.collect.crew import Crew
from jf_cluster.collect.dispatch import Dispatcher, Done, GivenUp, Lost
from jf_cluster.collect.prompts import Prompt, Prompts, load_prompts, unusable
from jf_cluster.collect.worker import Collector, Counts
from jf_cluster.config import Config, ConfigError
from jf_cluster.evaluate.graders.sandbox import SandboxError
from jf_cluster.models import ModelError, load_tokenizer, model_hash, resolve, tokenizer_hash
from jf_cluster.progress import meter
from jf_cluster.tracking import StageRun, Tracker
from jf_cluster.whole_files import write_whole
from trajectory_store import Manifest, Provenance, Round, StoreError, TrajectoryStore, without_secrets

logger = logging.getLogger(__name__)

METRICS_EVERY_S = 5.0


class CollectError(RuntimeError):
    """A round that cannot be collected; the message says why."""


@dataclass(frozen=True)
class Undertaking:
    """A round that is to be collected: where, from which prompts, and what its trajectories have in common."""

    folder: Round
    prompts: Prompts
    provenance: Provenance

    @classmethod
    def of(cls, config: Config, round_number: int) -> Undertaking:
        """What collecting round ``round_number`` is to bring.

        Raises:
            PromptsError: the prompts cannot be had.
            ModelError: model ``round_number - 1`` or the tokenizer is missing.
        """
        tokenizer = load_tokenizer(config)
        provenance = Provenance(
            model_hash=model_hash(config.model_dir(round_number - 1)),
            tokenizer_hash=tokenizer_hash(tokenizer),
            block_size=config.collect.block_size_of(round_number),
            seed=config.seed,
            round_number=round_number,
            code_version=__version__,
            config=config.shown(),
        )
        folder = TrajectoryStore(config.store_url).round(round_number)
        return cls(folder, load_prompts(config, tokenizer, round_number), provenance)


def collect_round(
    config: Config,
    round_number: int,
    tracker: Tracker,
    worker_class: type[Collector] = Collector,
    crew: Crew | None = None,
    undertaking: Undertaking | None = None,
    stop: threading.Event | None = None,
) -> Manifest:
    """Collect and seal round ``round_number`` with model ``round_number - 1``, from where an earlier attempt stopped.

    Args:
        worker_class: the job of the processes that decode.
        crew: these processes; by default new ones that end with the round.
        undertaking: what there is to do, where it is known already.
        stop: set by another thread to interrupt the work as Ctrl-C does.

    Raises:
        PromptsError: the prompts cannot be had.
        CollectError: no prompt of the round could be decoded.
        StoreError: the store refuses, or holds trajectories of another model.
    """
    store = TrajectoryStore(config.store_url)
    folder = store.round(round_number)
    if folder.is_sealed:
        return folder.manifest
    undertaking = undertaking or Undertaking.of(config, round_number)
    prompts, provenance = undertaking.prompts, undertaking.provenance
    with tracker.stage(round_number, "collect") as stage, Crew.given_or_own(crew, config) as hosts:
        stage.tags({"model_hash": provenance.model_hash, "store": without_secrets(config.store_url)})
        stage.params(
            {"block_size": provenance.block_size, "prompts": len(prompts), "responses": config.collect.responses}
        )
        summary = Summary(config.run_dir / "collecting" / f"round-{round_number:03d}.json")
        _work(config, undertaking, summary, stage, hosts, worker_class, stop)
        if not folder.committed_ids():
            reasons = sorted(set(folder.rejects().values()))[:3]
            raise CollectError(
                f"none of the {len(prompts)} prompts of round {round_number} could be decoded: {'; '.join(reasons)}; "
                "once the cause is removed, have them tried again: python -m trajectory_store rejects --retry "
                + shlex.quote(without_secrets(store.url_of(round_number)))
            )
        manifest = folder.seal(provenance)
        stage.tags({"store_hash": manifest.content_hash})
        stage.metrics(
            {
                "rows": manifest.rows,
                "rejects": manifest.rejects,
                "response_tokens": manifest.response_tokens,
                "iterations_per_block": manifest.iterations_per_block,
                "seconds": summary.seconds,
            }
        )
    logger.info(
        f"round {round_number} collected in {summary.seconds:.0f} s: {manifest.rows} trajectories, "
        f"{manifest.response_tokens} response tokens, {manifest.iterations_per_block:.2f} iterations per block, "
        f"{manifest.rejects} rejected → {folder.folder.path}"
    )
    return manifest


def _work(
    config: Config,
    undertaking: Undertaking,
    summary: Summary,
    stage: StageRun,
    crew: Crew,
    worker_class: type[Collector],
    stop: threading.Event | None,
) -> None:
    """Bring every prompt of the round to a committed trajectory or a reject."""
    folder, prompts, provenance = undertaking.folder, undertaking.prompts, undertaking.provenance
    round_number = provenance.round_number
    left = left_over(prompts, folder)
    logger.info(
        "collecting round %d with model %d: %d prompts, block size %d, %d workers%s",
        *(round_number, round_number - 1, len(left), provenance.block_size, config.collect.workers),
        f", {len(prompts) - len(left)} done before" if len(left) < len(prompts) else "",
    )
    if not len(left):
        return
    if len(left) == len(prompts):
        summary.attempts.clear()  # nothing is left of them: the round was removed to be made again
    attempt = uuid.uuid4().hex[:8]
    starts = itertools.count(1)

    def start(number: int) -> tuple[ActorHandle, ObjectRef]:
        return crew.start(worker_class, config, round_number, provenance, f"{attempt}.{number}.{next(starts)}")

    dispatcher: Dispatcher[Prompt, Counts] = Dispatcher(
        start,
        rest=crew.rest,
        stop=stop,
        workers=config.collect.workers,
        timeout_s=config.collect.batch_timeout_s,
        max_attempts=config.collect.max_attempts,
        fatal=(StoreError, OSError, ModelError, ConfigError, SandboxError),
    )
    total, logged_at = Counts(), 0.0
    troubles = Troubles(rejects=len(folder.rejects()))
    context = context_tokens(config)
    begun = time.monotonic()
    with meter(f"round {round_number} prompts", len(prompts), len(prompts) - len(left), stage.progress) as progress:

        def reject(prompt: Prompt, reason: str) -> None:
            folder.reject(prompt.prompt_id, reason)
            troubles.rejects += 1
            progress.advance(1)

        def usable() -> Iterator[list[Prompt]]:
            for batch in batches_of(config, prompts, left):
                reasons = [unusable(prompt, context, config.collect.max_new_tokens) for prompt in batch]
                for prompt, reason in zip(batch, reasons, strict=True):
                    if reason is not None:
                        reject(prompt, reason)
                if None in reasons:
                    yield [prompt for prompt, reason in zip(batch, reasons, strict=True) if reason is None]

        try:
            for event in dispatcher.run(usable()):
                match event:
                    case Done(items, counts):
                        total += counts
                        rate = total.response_tokens / (time.monotonic() - begun)
                        progress.advance(len(items), f"{rate:.0f} tokens/s")
                        if time.monotonic() - logged_at > METRICS_EVERY_S:
                            logged_at = time.monotonic()
                            stage.metrics(_metrics(total, rate, troubles, progress.done), step=progress.done)
                    case GivenUp(prompt, _) if folder.has_committed(prompt.prompt_id):
                        progress.advance(1)  # its worker died after it was safe, before it could say so
                    case GivenUp(prompt, reason):
                        reject(prompt, reason)
                        logger.warning("prompt %s is rejected: %s", prompt.prompt_id, reason)
                    case Lost(worker, reason, redone):
                        troubles.workers_replaced += 1
                        troubles.retries += redone
                        logger.warning("worker %d is replaced and its prompts are redone: %s", worker, reason)
        finally:
            summary.add(time.monotonic() - begun, total, troubles)
    rate = total.response_tokens / (time.monotonic() - begun)
    stage.metrics(_metrics(total, rate, troubles, progress.done), progress.done)


def context_tokens(config: Config) -> int:
    directory = resolve(config.model.base)
    settings = AutoConfig.from_pretrained(directory, trust_remote_code=config.model.trust_remote_code)
    return int(getattr(settings.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


@dataclass
class Troubles:
    """What went wrong in an attempt and was dealt with."""

    rejects: int = 0
    """Prompts given up on, those of earlier attempts included."""
    retries: int = 0
    """Prompts given out again because their worker was lost."""
    workers_replaced: int = 0


def _metrics(total: Counts, rate: float, troubles: Troubles, done: int) -> dict[str, float]:
    return {
        "prompts_done": done,
        "response_tokens_per_s": rate,
        "iterations_per_block_so_far": total.iterations / max(total.blocks, 1),
        "accepted_tokens_per_iteration": total.response_tokens / max(total.iterations, 1),
        "disagreement": total.disagreements / max(total.response_tokens, 1),
        "unfinished": total.unfinished,
        "reused_responses": total.reused,
        **asdict(troubles),
    }


class Summary:
    """What collecting a round took, over all attempts that something is left of: a small JSON file in the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: list[dict[str, object]] = json.loads(path.read_text())["attempts"] if path.is_file() else []

    @property
    def seconds(self) -> float:
        return sum(float(str(a["seconds"])) for a in self.attempts)

    def add(self, seconds: float, counts: Counts, troubles: Troubles) -> None:
        """Record an attempt, ended or interrupted."""
        self.attempts.append({"seconds": seconds, **asdict(troubles), **asdict(counts)})
        try:
            write_whole(self.path, json.dumps({"seconds": self.seconds, "attempts": self.attempts}, indent=1) + "\n")
        except OSError as error:  # must not hide what ended the attempt
            logger.warning("what this attempt took is not recorded: %s", error)
