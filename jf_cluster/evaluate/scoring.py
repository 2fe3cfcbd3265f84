"""From answers to figures: what a mode's answers come to, and an evaluation of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scipy.stats import binomtest

from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.evaluation import MODES, Evaluation, Mode, ModeResult, judge
from jf_cluster.evaluate.graders import extract
from jf_cluster.evaluate.tasks import grader_of
from jf_cluster.evaluate.worker import Answer, Answered, Speeds
from jf_cluster.models import model_hash

CONFIDENCE = 0.95


@dataclass
class Answers:
    """All answers so far, by mode and prompt id."""

    by_mode: dict[Mode, dict[str, Answer]] = field(default_factory=lambda: {mode: {} for mode in MODES})
    blocks: int = 0
    iterations: int = 0
    start_seconds: float = 0.0
    """Until the first worker was ready."""

    def add(self, answered: Answered) -> None:
        for mode in MODES:
            self.by_mode[mode].update((answer.prompt_id, answer) for answer in answered.answers[mode])
        self.blocks += answered.blocks
        self.iterations += answered.iterations

    def tpf_so_far(self) -> dict[str, float]:
        """Tokens per forward of each mode, as metrics."""
        runs = {mode: [run for a in found.values() for run in a.runs] for mode, found in self.by_mode.items()}
        return {f"tpf_{mode}_so_far": sum(found) / max(len(found), 1) for mode, found in runs.items()}

    @property
    def ar(self) -> Mapping[str, Answer]:
        return self.by_mode["ar"]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95% confidence interval of a share, Wilson's: sensible at 0, at 1 and for few."""
    interval = binomtest(right, asked).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def acceptance(runs: Iterable[int]) -> tuple[float, ...]:
    """By position i, the share of decode forwards that added more than i tokens; ``runs`` are the tokens each added."""
    counts = Counter(runs)
    forwards, more, shares = sum(counts.values()), sum(counts.values()), []
    for i in range(max(counts, default=0)):
        more -= counts[i]
        shares.append(more / forwards)
    return tuple(shares)


def result(found: Sequence[Answer], ar: Mapping[str, Answer], tps: float) -> ModeResult:
    """What the answers of one mode come to; ``ar`` are the same model's AR answers."""
    graded = [a.right for a in found if a.right is not None]
    runs = [run for a in found for run in a.runs]
    return ModeResult(
        accuracy=sum(graded) / len(graded) if graded else None,
        interval=wilson(sum(graded), len(graded)) if graded else None,
        tpf=sum(runs) / len(runs) if runs else 1.0,
        tps=tps,
        same_as_ar=_share(a.tokens == ar[a.prompt_id].tokens for a in found),
        acceptance=acceptance(runs),
    )


def evaluation(
    config: Config,
    round_number: int,
    prompts: Sequence[Prompt],
    answers: Answers,
    speeds: Speeds,
    base: Evaluation | None,
    *,
    rejected: int,
    seconds: float,
) -> Evaluation:
    """Put together what was measured on ``prompts``, which all have answers; ``base`` is None for the base itself."""
    by_mode = {
        mode: result([found[p.prompt_id] for p in prompts if p.prompt_id in found], answers.ar, speeds.modes[mode])
        for mode, found in answers.by_mode.items()
    }
    ar, grader = by_mode["ar"], grader_of(config)
    texts = {p.prompt_id: answers.ar[p.prompt_id].text for p in prompts}
    base_texts = base.responses if base is not None else texts
    shared = [i for i in texts if i in base_texts]
    expected = (base.ar if base is not None else ar).accuracy
    passed, reason = judge(ar.accuracy, expected, config.evaluate.max_accuracy_drop)
    return Evaluation(
        round=round_number,
        model_hash=model_hash(config.model_dir(round_number)),
        task=config.evaluate.task,
        prompts=len(prompts),
        rejected=rejected,
        speed_prompts=min(config.evaluate.speed_prompts, len(prompts)),
        ar=ar,
        jacobi=by_mode["jacobi"],
        multiblock=by_mode["multiblock"],
        tps_transformers=speeds.transformers,
        block_size=config.evaluate.decoding.block_size,
        iterations_per_block=answers.iterations / answers.blocks if answers.blocks else None,
        agreement_with_base=_share(extract(grader, texts[i]) == extract(grader, base_texts[i]) for i in shared),
        responses_same_as_base=_share(texts[i] == base_texts[i] for i in shared),
        unfinished=sum(not answers.ar[p.prompt_id].finished for p in prompts),
        accuracy_drop=None if ar.accuracy is None or expected is None else expected - ar.accuracy,
        passed=passed,
        reason=reason,
        seconds=seconds,
        start_seconds=answers.start_seconds,
        responses=texts,
        right=None if grader == "none" else {i: right for i in texts if (right := answers.ar[i].right) is not None},
    )


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0
