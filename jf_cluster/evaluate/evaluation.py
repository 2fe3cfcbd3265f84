"""What an evaluation says, and its file.

A run's own task, the one it was begun with, decides what passes. Evaluations on another task lie ``beside`` those.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from jf_cluster.config import Config, Task
from jf_cluster.whole_files import write_whole

logger = logging.getLogger(__name__)

Mode = Literal["ar", "jacobi", "multiblock"]
MODES: tuple[Mode, ...] = get_args(Mode)


class EvaluateError(RuntimeError):
    """A model that cannot be evaluated, or an evaluation that cannot be read; the message says why."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModeResult(_Frozen):
    """One decoding mode on the task's prompts."""

    accuracy: float | None
    """Share of right answers; None without a grader."""
    interval: tuple[float, float] | None = None
    """95% confidence interval of the accuracy (Wilson's)."""
    tpf: float
    """Response tokens per decode forward over all prompts, the prefill's token not counted."""
    tps: float
    """Median over prompts of response tokens per second, one prompt at a time, prefill not counted."""
    same_as_ar: float
    """Share of responses that are token for token this model's AR responses: 1 in float32."""
    acceptance: tuple[float, ...] = ()
    """By position i, from 0: share of decode forwards that added more than i tokens. Their sum is the TPF."""


class ModeChange(_Frozen):
    """How a decoding mode of a model differs from the same mode of an earlier one; ratios are now over before."""

    accuracy: float | None
    """Difference of the shares; None where one of them was not graded."""
    tpf_ratio: float
    tps_ratio: float
    """The two were not measured side by side, so the machine's load is in it."""
    speedup_ratio: float
    """Of the speed over the strongest AR, which was measured beside it: the machine's load is not in it."""


class Comparison(_Frozen):
    """How model ``now`` differs from model ``before``; counts are of prompts that both answered, in mode AR."""

    now: int
    before: int
    ar: ModeChange
    jacobi: ModeChange
    multiblock: ModeChange
    gained: int
    """Right now, wrong before."""
    lost: int
    chance: float | None
    """How often gained and lost prompts would differ at least so much if both models were equally good (McNemar)."""
    same_responses: float
    """Share of responses that are the same, character for character."""
    agreement: float
    """Difference of the shares of prompts answered as the base answers them."""
    iterations_ratio: float | None
    """Of the iterations per block; None where one of them was not measured."""

    def mode(self, name: Mode) -> ModeChange:
        """How one decoding mode differs."""
        change: ModeChange = getattr(self, name)
        return change


class Evaluation(_Frozen):
    """How good and how fast model ``round`` is (0 is the base)."""

    round: int
    model_hash: str
    task: Task = "held_out"
    prompts: int
    """Prompts that were decoded."""
    rejected: int
    """Prompts that could not be decoded; they count nowhere."""
    speed_prompts: int
    ar: ModeResult
    jacobi: ModeResult
    multiblock: ModeResult
    tps_transformers: float | None = None
    """As ``tps``, of transformers' own greedy ``generate`` on the same model: the other AR baseline."""
    block_size: int | None = None
    """Tokens of the blocks that ``iterations_per_block`` counts (``evaluate.decoding.block_size``)."""
    iterations_per_block: float | None = None
    """Jacobi iterations until a block of the AR responses is fixed, the mean over all blocks."""
    agreement_with_base: float
    """Share of prompts whose AR answer is the base's (the whole response where no grader reads an answer)."""
    responses_same_as_base: float
    """Share of prompts whose AR response is the base's, character for character."""
    unfinished: int
    """AR responses cut at the length limit."""
    accuracy_drop: float | None
    """Accuracy of the base minus this model's, AR."""
    passed: bool
    """False where accuracy fell by more than ``evaluate.max_accuracy_drop``; such a model never becomes champion."""
    reason: str
    """Why it passed or failed, in one sentence with the figures and the margin."""
    seconds: float
    start_seconds: float = 0.0
    """Of these, until the first worker was ready."""
    responses: dict[str, str]
    """AR response of each prompt, by prompt id."""
    right: dict[str, bool] | None = None
    """Whether the AR response is right, by id of each prompt with a reference answer; None without a grader."""
    comparisons: tuple[Comparison, ...] = ()
    """Against every earlier round that was evaluated, the base first."""

    def mode(self, name: Mode) -> ModeResult:
        """Result of one decoding mode."""
        result: ModeResult = getattr(self, name)
        return result

    @property
    def strongest_ar_tps(self) -> float:
        """Tokens per second of the fastest autoregressive decoding of this model: this engine's or transformers'."""
        return max(self.ar.tps, self.tps_transformers or 0.0)

    def speedup(self, name: Mode) -> float:
        """Tokens per second of a mode over the strongest AR baseline."""
        return self.mode(name).tps / self.strongest_ar_tps if self.strongest_ar_tps else 0.0


def judge(accuracy: float | None, base: float | None, margin: float) -> tuple[bool, str]:
    """Say whether a model passes the gate, and why: its accuracy may fall below the base's by at most ``margin``.

    Accuracies are shares in [0, 1]; None (no grader) passes, because nothing says that it fell.
    """
    if accuracy is None or base is None:
        return True, "not graded: without prompts.grader nothing says whether accuracy fell"
    # Shares of a few hundred prompts: 0.96 - 0.94 must not exceed 0.02 by a rounding error.
    passed = accuracy - base >= -margin - 1e-9
    change = f"accuracy {100 * accuracy:.1f}%, the base's {100 * base:.1f}%"
    if passed:
        return True, f"{change}: within the {100 * margin:.1f} points that evaluate.max_accuracy_drop allows"
    return False, (
        f"{change}: a loss of {100 * (base - accuracy):.1f} points, more than the {100 * margin:.1f} that "
        "evaluate.max_accuracy_drop allows"
    )


def evaluation_path(config: Config, round_number: int, *, beside: bool = False) -> Path:
    """File of a round's evaluation on the run's own task, or on the configured one ``beside`` it."""
    task = f"-{config.evaluate.task}" if beside else ""
    return config.run_dir / "evaluation" / f"round-{round_number:03d}{task}.json"


def evaluations_until(config: Config, last_round: int, *, beside: bool = False) -> list[Evaluation]:
    """The evaluations there are of rounds 0 to ``last_round``; errors as ``load_evaluation``."""
    return [e for r in range(last_round + 1) if (e := load_evaluation(config, r, beside=beside)) is not None]


def load_evaluation(config: Config, round_number: int, *, beside: bool = False) -> Evaluation | None:
    """Give a round's evaluation, or None where there is none yet or the model was made again since.

    Raises:
        EvaluateError: the file is damaged or of a version that measured other things.
        ModelError: what lies in the model's place is no model.
    """
    path = evaluation_path(config, round_number, beside=beside)
    if not path.is_file():
        return None
    try:
        found = Evaluation.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluateError(
            f"{path} is not an evaluation of this version ({'.'.join(map(str, first['loc']))}: {first['msg']}): delete "
            "it and evaluate the model again"
        ) from error
    if made_hash(config, round_number) in (None, found.model_hash):
        return found
    _tell_of_another_model(path, round_number)
    return None


def made_hash(config: Config, round_number: int) -> str | None:
    """Hash of the model there is of a round; None where there is none, or nothing says it, as of most bases.

    Raises:
        ModelError: what lies in the model's place is no model.
    """
    directory = Path(config.model_dir(round_number))
    if not directory.is_dir():
        return None
    lineage = directory / "lineage.json"
    if lineage.is_file():  # an older version's names none, and hashing a large model takes longer than a report may
        recorded: str | None = json.loads(lineage.read_text()).get("model_hash")
        return recorded
    if round_number == 0:
        return None
    from jf_cluster.models import model_hash  # late: with torch

    return model_hash(str(directory))


@functools.cache  # once a process: evaluations are loaded again and again
def _tell_of_another_model(path: Path, round_number: int) -> None:
    logger.warning("%s is of another model %d than there is now: it counts as not evaluated", path, round_number)


def save_evaluation(config: Config, evaluation: Evaluation, *, beside: bool = False) -> Path:
    """Write an evaluation in one atomic step."""
    path = evaluation_path(config, evaluation.round, beside=beside)
    write_whole(path, evaluation.model_dump_json(indent=1) + "\n")
    return path
