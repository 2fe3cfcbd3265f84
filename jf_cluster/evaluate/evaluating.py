"""Evaluating a round, seen from the driver: quality on all workers, then speed on one while the others are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import RayError, RayTaskError

from jf_cluster.collect.batches import batches_by_length
from jf_cluster.collect.collecting import context_tokens
from jf_cluster.collect.crew import Crew
from jf_cluster.collect.dispatch import Dispatcher, Done, GivenUp, Lost
from jf_cluster.collect.prompts import Prompt, unusable
from jf_cluster.config import Config
from jf_cluster.evaluate.comparison import accuracy_text, compared, figures
from jf_cluster.evaluate.evaluation import (
    MODES,
    EvaluateError,
    Evaluation,
    evaluations_until,
    load_evaluation,
    save_evaluation,
)
from jf_cluster.evaluate.graders.sandbox import SandboxError
from jf_cluster.evaluate.looking import look_at
from jf_cluster.evaluate.scoring import Answers, evaluation
from jf_cluster.evaluate.tasks import evaluation_prompts
from jf_cluster.evaluate.worker import Answered, Evaluator, Speeds
from jf_cluster.model_card import CARD, write_card
from jf_cluster.models import ModelError, load_tokenizer
from jf_cluster.progress import meter
from jf_cluster.tracking import StageRun, Tracker

logger = logging.getLogger(__name__)


def evaluate_round(
    config: Config, round_number: int, tracker: Tracker, crew: Crew | None = None, *, beside: bool = False
) -> Evaluation:
    """Evaluate model ``round_number`` on the configured task, once; later calls give the stored result.

    The base's evaluation must exist before any other round's: agreement is measured against it.

    Args:
        crew: the processes that decode; by default new ones that end with the evaluation.
        beside: the configured task is not the run's own; what is found has a file and an MLflow run of its own, and
            neither the model's card nor the pictures show it.

    Raises:
        PromptsError: the task's prompts cannot be had.
        EvaluateError: no prompt could be decoded, or the base has not been evaluated (on this task).
    """
    base = load_evaluation(config, 0, beside=beside)
    if (known := load_evaluation(config, round_number, beside=beside)) is not None:
        if not beside:
            _tell_on_the_card(config, known, base)
        return known
    if base is None and round_number > 0:
        raise EvaluateError("the base model is evaluated first, the others are measured against it: use --round 0")
    if base is not None and base.task != config.evaluate.task:
        raise EvaluateError(
            f"the base was evaluated on {base.task}, not on {config.evaluate.task}; to evaluate all models again, "
            f"delete {config.run_dir / 'evaluation'}"
        )
    begun = time.monotonic()
    tokenizer = load_tokenizer(config)
    context = context_tokens(config)
    asked = evaluation_prompts(config, tokenizer)
    prompts = [p for p in asked if unusable(p, context, config.evaluate.max_new_tokens) is None]
    if not prompts:
        reason = unusable(asked[0], context, config.evaluate.max_new_tokens)
        raise EvaluateError(f"none of the {len(asked)} prompts can be decoded, for example: {reason}")
    logger.info(
        "evaluating model %d on %d prompts of %s in modes %s",
        *(round_number, len(prompts), config.evaluate.task, ", ".join(MODES)),
    )
    task = config.evaluate.task if beside else None
    with tracker.stage(round_number, "evaluate", task=task) as stage, Crew.given_or_own(crew, config) as hosts:
        answers = _answers(config, round_number, prompts, stage, hosts)
        answered = [p for p in prompts if p.prompt_id in answers.ar]
        speeds = _speeds(config, round_number, answered, hosts)
        found = evaluation(
            *(config, round_number, answered, answers, speeds, base),
            rejected=len(asked) - len(answered),
            seconds=time.monotonic() - begun,
        )
        found = compared(found, evaluations_until(config, round_number - 1, beside=beside))
        if not beside:
            _tell_on_the_card(config, found, base)
        stage.tags({"model_hash": found.model_hash, "passed": found.passed, "verdict": found.reason})
        stage.metrics(_metrics(found))
        for comparison in found.comparisons:
            against = {f"against_earlier/{name}": value for name, value in figures(comparison).items()}
            stage.metrics(against, step=comparison.before)
        path = save_evaluation(config, found, beside=beside)  # after it nothing of this stage is made again
        stage.artifact(path)
        if round_number > 0 and not beside:
            stage.artifact(Path(config.model_dir(round_number)) / CARD)
        if not beside and (look := look_at(config, round_number, answered, hosts)) is not None:
            stage.artifact(look)
    logger.info(
        "model %d evaluated in %.0f s: accuracy %% %s, Jacobi %.2f tokens per forward, %.2f times AR's speed, "
        "agreement with the base %.3f → %s",
        *(round_number, found.seconds, accuracy_text(found.ar), found.jacobi.tpf),
        *(found.speedup("jacobi"), found.agreement_with_base, path),
    )
    if not found.passed:
        logger.warning("model %d failed: %s", round_number, found.reason)
    return found


def _answers(config: Config, round_number: int, prompts: Sequence[Prompt], stage: StageRun, crew: Crew) -> Answers:
    """Decode all prompts on the workers; prompts given up on are missing from the result."""
    multiblock = frozenset(p.prompt_id for p in prompts[: config.evaluate.multiblock_prompts])
    dispatcher: Dispatcher[Prompt, Answered] = Dispatcher(
        lambda _: crew.start(Evaluator, config, round_number, multiblock),
        rest=crew.rest,
        workers=config.collect.workers,
        timeout_s=config.collect.batch_timeout_s,
        max_attempts=config.collect.max_attempts,
        fatal=(ModelError, SandboxError),
    )
    answers = Answers()
    with meter(f"model {round_number} evaluation prompts", len(prompts), tell=stage.progress) as progress:
        batches = batches_by_length([len(p.tokens) for p in prompts], config.evaluate.batch_prompts)
        for event in dispatcher.run([prompts[i] for i in places] for places in batches):
            match event:
                case Done(items, found):
                    answers.add(found)
                    progress.advance(len(items))
                    stage.metrics({"prompts_done": progress.done, **answers.tpf_so_far()}, step=progress.done)
                case GivenUp(prompt, reason):
                    logger.warning("prompt %s is left out: %s", prompt.prompt_id, reason)
                case Lost(worker, reason):
                    logger.warning("worker %d is replaced and its prompts are redone: %s", worker, reason)
    answers.start_seconds = dispatcher.ready_after_s or 0.0
    if not answers.ar:
        raise EvaluateError(f"none of the {len(prompts)} prompts could be decoded")
    return answers


def _speeds(config: Config, round_number: int, prompts: Sequence[Prompt], crew: Crew) -> Speeds:
    """Measure tokens per second on one worker; the others have nothing to do, so nothing competes with it."""
    chosen = sorted(prompts, key=lambda p: p.prompt_id)[: config.evaluate.speed_prompts]
    attempts = config.collect.max_attempts
    for attempt in range(1, attempts + 1):
        try:
            timeout_s = config.collect.batch_timeout_s
            measured: Speeds = crew.ask(timeout_s, Evaluator, (config, round_number, ()), "speed", chosen)
            return measured
        except RayTaskError:  # what failed is the measuring, not the worker
            raise
        except RayError as error:
            logger.warning("measuring speed failed (%d of %d attempts): %s", attempt, attempts, error)
    raise EvaluateError(f"speed could not be measured: the worker failed {attempts} times")


def _tell_on_the_card(config: Config, evaluation: Evaluation, base: Evaluation | None) -> None:
    """Put the measured table on the card of a model this run exported; the base's directory is not ours to write."""
    if evaluation.round > 0 and base is not None and (directory := Path(config.model_dir(evaluation.round))).is_dir():
        write_card(
            directory,
            round_number=evaluation.round,
            base=config.model.base,
            dtype=config.model.dtype,
            evaluations={"base": base, f"round {evaluation.round}": evaluation},
        )


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    metrics = {
        "agreement_with_base": evaluation.agreement_with_base,
        "responses_same_as_base": evaluation.responses_same_as_base,
        "unfinished": evaluation.unfinished,
        "seconds": evaluation.seconds,
        "passed": evaluation.passed,
        "tps_transformers": evaluation.tps_transformers or 0.0,
    }
    if evaluation.iterations_per_block is not None:
        metrics["iterations_per_block"] = evaluation.iterations_per_block
    for mode in MODES:
        result = evaluation.mode(mode)
        metrics |= {f"tpf_{mode}": result.tpf, f"tps_{mode}": result.tps, f"speedup_{mode}": evaluation.speedup(mode)}
        if result.accuracy is not None:
            metrics[f"accuracy_{mode}"] = result.accuracy
        if result.interval is not None:
            metrics[f"accuracy_low_{mode}"], metrics[f"accuracy_high_{mode}"] = result.interval
    return metrics
