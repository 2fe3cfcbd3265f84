"""Evaluating a round, seen from the driver: quality on all workers, then speed on one while the others are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from jf_cluster.collect.collecting import batches_by_length, context_tokens
from jf_cluster.collect.dispatch import Dispatcher, Done, GivenUp, Lost
from jf_cluster.collect.graders import extract, is_right
from jf_cluster.collect.prompts import Prompt, held_out_prompts, unusable
from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import (
    MODES,
    Evaluation,
    Mode,
    ModeResult,
    judge,
    load_evaluation,
    save_evaluation,
)
from jf_cluster.evaluate.worker import Answer, Evaluator
from jf_cluster.model_card import write_card
from jf_cluster.models import ModelError, load_tokenizer, model_hash
from jf_cluster.progress import meter
from jf_cluster.tracking import StageRun, Tracker

logger = logging.getLogger(__name__)

Answers = Mapping[Mode, Mapping[str, Answer]]


class EvaluateError(RuntimeError):
    """A model that cannot be evaluated; the message says why."""


def evaluate_round(config: Config, round_number: int, tracker: Tracker) -> Evaluation:
    """Evaluate model ``round_number`` on the held-out prompts, once; later calls give the stored result.

    The base's evaluation must exist before any other round's: agreement is measured against it.

    Raises:
        PromptsError: the held-out prompts cannot be had.
        EvaluateError: no prompt could be decoded, or the base has not been evaluated.
    """
    base = load_evaluation(config, 0)
    if (known := load_evaluation(config, round_number)) is not None:
        _tell_on_the_card(config, known, base)
        return known
    if base is None and round_number > 0:
        raise EvaluateError("the base model is evaluated first, the others are measured against it: use --round 0")
    begun = time.monotonic()
    tokenizer = load_tokenizer(config)
    context = context_tokens(config)
    held_out = held_out_prompts(config, tokenizer)[: config.evaluate.prompts]
    prompts = [p for p in held_out if unusable(p, context, config.evaluate.max_new_tokens) is None]
    if not prompts:
        reason = unusable(held_out[0], context, config.evaluate.max_new_tokens)
        raise EvaluateError(f"none of the {len(held_out)} held-out prompts can be decoded, for example: {reason}")
    logger.info("evaluating model %d on %d held-out prompts in modes %s", round_number, len(prompts), ", ".join(MODES))
    with tracker.stage(round_number, "evaluate") as stage:
        answers = _answers(config, round_number, prompts, stage)
        speeds = _speeds(config, round_number, [p for p in prompts if p.prompt_id in answers["ar"]])
        evaluation = _judged(
            config, round_number, prompts, answers, speeds, base, time.monotonic() - begun, len(held_out)
        )
        path = save_evaluation(config, evaluation)
        _tell_on_the_card(config, evaluation, base)
        stage.tags({"model_hash": evaluation.model_hash, "passed": evaluation.passed, "verdict": evaluation.reason})
        stage.metrics(_metrics(evaluation))
        stage.artifact(path)
    jacobi = evaluation.jacobi
    logger.info(
        "model %d evaluated in %.0f s: accuracy %s, Jacobi %.2f tokens per forward, %.2f times AR's speed, "
        "agreement with the base %.3f → %s",
        *(round_number, evaluation.seconds, _percent(evaluation.ar.accuracy), jacobi.tpf),
        *(evaluation.speedup("jacobi"), evaluation.agreement_with_base, path),
    )
    if not evaluation.passed:
        logger.warning("model %d failed: %s", round_number, evaluation.reason)
    return evaluation


def _answers(config: Config, round_number: int, prompts: Sequence[Prompt], stage: StageRun) -> Answers:
    """Decode all prompts in every mode on the workers; prompts given up on are missing from the result."""
    remote = ray.remote(num_cpus=config.collect.cpus_per_worker, num_gpus=config.collect.gpus_per_worker)(Evaluator)
    dispatcher: Dispatcher[Prompt, dict[Mode, list[Answer]]] = Dispatcher(
        lambda _: remote.remote(config, round_number),
        workers=config.collect.workers,
        timeout_s=config.collect.batch_timeout_s,
        max_attempts=config.collect.max_attempts,
        fatal=(ModelError,),
    )
    answers: dict[Mode, dict[str, Answer]] = {mode: {} for mode in MODES}
    with meter(f"model {round_number} held-out prompts", len(prompts), tell=stage.progress) as progress:
        for event in dispatcher.run(batches_by_length(prompts, config.evaluate.batch_prompts)):
            match event:
                case Done(items, found):
                    for mode in MODES:
                        answers[mode].update((answer.prompt_id, answer) for answer in found[mode])
                    progress.advance(len(items))
                    stage.metrics({"prompts_done": progress.done, **_tpf_so_far(answers)}, step=progress.done)
                case GivenUp(prompt, reason):
                    logger.warning("held-out prompt %s is left out: %s", prompt.prompt_id, reason)
                case Lost(worker, reason):
                    logger.warning("worker %d is replaced and its prompts are redone: %s", worker, reason)
    if not answers["ar"]:
        raise EvaluateError(f"none of the {len(prompts)} held-out prompts could be decoded")
    return answers


def _speeds(config: Config, round_number: int, prompts: Sequence[Prompt]) -> dict[Mode, float]:
    """Measure tokens per second on one worker; the others have ended, so nothing competes with it."""
    chosen = sorted(prompts, key=lambda p: p.prompt_id)[: config.evaluate.speed_prompts]
    remote = ray.remote(num_cpus=config.collect.cpus_per_worker, num_gpus=config.collect.gpus_per_worker)(Evaluator)
    attempts = config.collect.max_attempts
    for attempt in range(1, attempts + 1):
        actor = remote.remote(config, round_number)
        try:
            measured: dict[Mode, float] = ray.get(actor.speed.remote(chosen), timeout=config.collect.batch_timeout_s)
            return measured
        except (RayActorError, GetTimeoutError) as error:
            logger.warning("measuring speed failed (%d of %d attempts): %s", attempt, attempts, error)
        finally:
            ray.kill(actor)
    raise EvaluateError(f"speed could not be measured: the worker failed {attempts} times")


def _judged(
    config: Config,
    round_number: int,
    prompts: Sequence[Prompt],
    answers: Answers,
    speeds: Mapping[Mode, float],
    base: Evaluation | None,
    seconds: float,
    asked: int,
) -> Evaluation:
    grader = config.prompts.grader
    answered = [p for p in prompts if p.prompt_id in answers["ar"]]
    texts = {p.prompt_id: answers["ar"][p.prompt_id].text for p in answered}
    base_texts = base.responses if base is not None else texts
    shared = [i for i in texts if i in base_texts]

    def result(mode: Mode) -> ModeResult:
        found = [answers[mode][p.prompt_id] for p in answered]
        forwards = sum(a.forwards for a in found)
        right = None
        if grader != "none":
            right = sum(is_right(grader, answers[mode][p.prompt_id].text, p.answer) for p in answered) / len(answered)
        return ModeResult(
            accuracy=right,
            tpf=sum(len(a.tokens) - 1 for a in found) / forwards if forwards else 1.0,
            tps=speeds[mode],
            same_as_ar=sum(a.tokens == answers["ar"][a.prompt_id].tokens for a in found) / len(found),
        )

    ar = result("ar")
    expected = (base.ar if base is not None else ar).accuracy
    passed, reason = judge(ar.accuracy, expected, config.evaluate.max_accuracy_drop)
    return Evaluation(
        round=round_number,
        model_hash=model_hash(config.model_dir(round_number)),
        prompts=len(answered),
        rejected=asked - len(answered),
        speed_prompts=min(config.evaluate.speed_prompts, len(answered)),
        ar=ar,
        jacobi=result("jacobi"),
        multiblock=result("multiblock"),
        agreement_with_base=_share(extract(grader, texts[i]) == extract(grader, base_texts[i]) for i in shared),
        responses_same_as_base=_share(texts[i] == base_texts[i] for i in shared),
        unfinished=sum(not answers["ar"][p.prompt_id].finished for p in answered),
        accuracy_drop=None if ar.accuracy is None or expected is None else expected - ar.accuracy,
        passed=passed,
        reason=reason,
        seconds=seconds,
        responses=texts,
    )


def _tpf_so_far(answers: Answers) -> dict[str, float]:
    tokens = {mode: sum(len(a.tokens) - 1 for a in found.values()) for mode, found in answers.items()}
    forwards = {mode: sum(a.forwards for a in found.values()) for mode, found in answers.items()}
    return {f"tpf_{mode}_so_far": tokens[mode] / max(forwards[mode], 1) for mode in MODES}


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0


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
    }
    for mode in MODES:
        result = evaluation.mode(mode)
        metrics |= {f"tpf_{mode}": result.tpf, f"tps_{mode}": result.tps, f"speedup_{mode}": evaluation.speedup(mode)}
        if result.accuracy is not None:
            metrics[f"accuracy_{mode}"] = result.accuracy
    return metrics


def _percent(share: float | None) -> str:
    return "not graded" if share is None else f"{100 * share:.1f}%"
