"""What an evaluation says, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from jf_cluster.config import Config

Mode = Literal["ar", "jacobi", "multiblock"]
MODES: tuple[Mode, ...] = get_args(Mode)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModeResult(_Frozen):
    """One decoding mode on the held-out prompts."""

    accuracy: float | None
    """Share of right answers; None without a grader."""
    tpf: float
    """Response tokens per decode forward over all prompts, the prefill's token not counted."""
    tps: float
    """Median over prompts of response tokens per second, one prompt at a time, prefill not counted."""
    same_as_ar: float
    """Share of responses that are token for token this model's AR responses: 1 in float32."""


class Evaluation(_Frozen):
    """How good and how fast model ``round`` is (0 is the base)."""

    round: int
    model_hash: str
    prompts: int
    rejected: int
    """Held-out prompts that could not be decoded."""
    speed_prompts: int
    ar: ModeResult
    jacobi: ModeResult
    multiblock: ModeResult
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
    responses: dict[str, str]
    """AR response of each held-out prompt, by prompt id."""

    def mode(self, name: Mode) -> ModeResult:
        """Result of one decoding mode."""
        result: ModeResult = getattr(self, name)
        return result

    def speedup(self, name: Mode) -> float:
        """Tokens per second of a mode over this model's AR."""
        return self.mode(name).tps / self.ar.tps if self.ar.tps else 0.0


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


def evaluation_path(config: Config, round_number: int) -> Path:
    """File of a round's evaluation."""
    return config.run_dir / "evaluation" / f"round-{round_number:03d}.json"


def load_evaluation(config: Config, round_number: int) -> Evaluation | None:
    """Give a round's evaluation, or None where there is none yet."""
    path = evaluation_path(config, round_number)
    return Evaluation.model_validate_json(path.read_text()) if path.is_file() else None


def save_evaluation(config: Config, evaluation: Evaluation) -> Path:
    """Write an evaluation in one atomic step."""
    path = evaluation_path(config, evaluation.round)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(evaluation.model_dump_json(indent=1) + "\n")
    draft.replace(path)
    return path
