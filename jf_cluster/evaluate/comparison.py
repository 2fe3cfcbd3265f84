"""A model against every earlier one on the same prompts, and both as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy.stats import binomtest

from jf_cluster.evaluate.evaluation import MODES, Evaluation, ModeResult

REACHED = (2, 4, 8, 16)
"""Tokens a forward adds that the table gives the share of; the evaluation's file has all."""


@dataclass(frozen=True)
class Comparison:
    """How model ``now`` differs from model ``before``; counts are of prompts that both answered."""

    now: int
    before: int
    accuracy_change: float | None
    """Shares; None where one of them was not graded."""
    gained: int
    """Right now, wrong before."""
    lost: int
    chance: float | None
    """How often gained and lost prompts would differ at least so much if both models were equally good (McNemar)."""
    same_responses: float
    """Share of responses that are the same, character for character."""
    tpf_ratio: float
    """Jacobi, now over before."""
    tps_ratio: float
    """Jacobi; the two were not measured side by side, so the machine's load is in it."""
    speedup_ratio: float
    """Jacobi over the strongest AR, which was measured beside it: the machine's load is not in it."""


def compare(now: Evaluation, before: Evaluation) -> Comparison:
    """Compare two evaluations of the same task."""
    both = [i for i in now.responses if i in before.responses]
    gained = lost = 0
    if now.right is not None and before.right is not None:
        gained = sum(now.right[i] and not before.right[i] for i in both)
        lost = sum(before.right[i] and not now.right[i] for i in both)
    graded = now.ar.accuracy is not None and before.ar.accuracy is not None
    return Comparison(
        now=now.round,
        before=before.round,
        accuracy_change=(now.ar.accuracy or 0.0) - (before.ar.accuracy or 0.0) if graded else None,
        gained=gained,
        lost=lost,
        chance=float(binomtest(gained, gained + lost).pvalue) if gained + lost else None,
        same_responses=sum(now.responses[i] == before.responses[i] for i in both) / len(both) if both else 0.0,
        tpf_ratio=now.jacobi.tpf / before.jacobi.tpf,
        tps_ratio=now.jacobi.tps / before.jacobi.tps if before.jacobi.tps else 0.0,
        speedup_ratio=now.speedup("jacobi") / before.speedup("jacobi") if before.jacobi.tps else 0.0,
    )


def modes_table(evaluation: Evaluation) -> Table:
    """Every decoding mode of one model, its AR baselines included."""
    verdict = "passed" if evaluation.passed else "FAILED"
    measured = f"model {evaluation.round} on {evaluation.task}, {evaluation.prompts} prompts"
    title = f"{measured}: {verdict}, {evaluation.reason}"
    caption = ""
    if evaluation.iterations_per_block is not None:
        caption = f"{evaluation.iterations_per_block:.2f} Jacobi iterations per block of {evaluation.block_size} tokens"
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("decoding")
    reached = f"forwards that add at\nleast {', '.join(map(str, REACHED))} tokens, %"
    for name in ("accuracy %\n(95% interval)", "same as AR\n%", "tokens/forward", "tokens/second", "speed-up", reached):
        shown.add_column(name, justify="right", no_wrap=True)
    for mode in MODES:
        result = evaluation.mode(mode)
        shown.add_row(
            mode,
            accuracy_text(result),
            f"{100 * result.same_as_ar:.1f}",
            f"{result.tpf:.2f}",
            f"{result.tps:.0f}",
            f"{evaluation.speedup(mode):.2f}",
            "  ".join(f"{100 * sum(result.acceptance[n - 1 : n]):.0f}" for n in REACHED),
        )
    if evaluation.tps_transformers is not None:
        ratio = evaluation.tps_transformers / evaluation.strongest_ar_tps if evaluation.strongest_ar_tps else 0.0
        shown.add_row("ar, transformers", "", "", "1.00", f"{evaluation.tps_transformers:.0f}", f"{ratio:.2f}")
    return shown


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each earlier model."""
    shown = Table(title=f"model {comparisons[0].now} against earlier ones", title_justify="left")
    shown.add_column("against")
    for name in (
        "accuracy, points",
        "gained, lost",
        "by chance",
        "same responses %",
        "tokens/forward, times",
        "tokens/second, times",
        "speed-up, times",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for c in comparisons:
        shown.add_row(
            "base" if c.before == 0 else f"model {c.before}",
            "-" if c.accuracy_change is None else f"{100 * c.accuracy_change:+.1f}",
            "-" if c.accuracy_change is None else f"{c.gained}, {c.lost}",
            "-" if c.chance is None else f"{c.chance:.2f}",
            f"{100 * c.same_responses:.1f}",
            f"{c.tpf_ratio:.2f}",
            f"{c.tps_ratio:.2f}",
            f"{c.speedup_ratio:.2f}",
        )
    return shown


def accuracy_text(result: ModeResult) -> str:
    """Accuracy in percent with its interval."""
    if result.accuracy is None:
        return "not graded"
    interval = "" if result.interval is None else " ({:.1f} to {:.1f})".format(*(100 * x for x in result.interval))
    return f"{100 * result.accuracy:.1f}{interval}"
