"""A model against every earlier one on the same prompts, and both as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from scipy.stats import binomtest

from jf_cluster.evaluate.evaluation import MODES, Comparison, Evaluation, Mode, ModeChange, ModeResult

REACHED = (2, 4, 8, 16)
"""Tokens a forward adds that the table gives the share of; the evaluation's file has all."""


def compare(now: Evaluation, before: Evaluation) -> Comparison:
    """Compare two evaluations of the same task."""
    both = [i for i in now.responses if i in before.responses]
    gained = lost = 0
    if now.right is not None and before.right is not None:
        graded = now.right.keys() & before.right.keys()
        gained = sum(now.right[i] and not before.right[i] for i in graded)
        lost = sum(before.right[i] and not now.right[i] for i in graded)
    iterations = now.iterations_per_block, before.iterations_per_block
    return Comparison(
        now=now.round,
        before=before.round,
        ar=_change(now, before, "ar"),
        jacobi=_change(now, before, "jacobi"),
        multiblock=_change(now, before, "multiblock"),
        gained=gained,
        lost=lost,
        chance=float(binomtest(gained, gained + lost).pvalue) if gained + lost else None,
        same_responses=sum(now.responses[i] == before.responses[i] for i in both) / len(both) if both else 0.0,
        agreement=now.agreement_with_base - before.agreement_with_base,
        iterations_ratio=iterations[0] / iterations[1] if iterations[0] and iterations[1] else None,
    )


def _change(now: Evaluation, before: Evaluation, mode: Mode) -> ModeChange:
    mine, other = now.mode(mode), before.mode(mode)
    graded = mine.accuracy is not None and other.accuracy is not None
    return ModeChange(
        accuracy=(mine.accuracy or 0.0) - (other.accuracy or 0.0) if graded else None,
        tpf_ratio=mine.tpf / other.tpf,
        tps_ratio=mine.tps / other.tps if other.tps else 0.0,
        speedup_ratio=now.speedup(mode) / before.speedup(mode) if other.tps else 0.0,
    )


def compared(now: Evaluation, earlier: Iterable[Evaluation]) -> Evaluation:
    """The evaluation with how it differs from each of the ``earlier`` ones."""
    return now.model_copy(update={"comparisons": tuple(compare(now, before) for before in earlier)})


def figures(comparison: Comparison) -> dict[str, float]:
    """Every figure that is known of a comparison, by name, as metrics."""
    found = {
        name: value
        for name, value in comparison.model_dump(exclude={"now", "before", *MODES}).items()
        if value is not None
    }
    for mode in MODES:
        changes = comparison.mode(mode).model_dump()
        found |= {f"{name}_{mode}": value for name, value in changes.items() if value is not None}
    return found


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
        "accuracy\npoints\nAR, Jacobi, multi",
        "gained, lost",
        "by chance",
        "same\nresponses %",
        "iterations\nper block\ntimes",
        "tokens/forward\ntimes\nJacobi, multi",
        "tokens/second\ntimes\nAR, Jacobi, multi",
        "speed-up\ntimes\nJacobi, multi",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for c in comparisons:
        drafted, graded = (c.jacobi, c.multiblock), c.ar.accuracy is not None
        shown.add_row(
            "base" if c.before == 0 else f"model {c.before}",
            "  ".join(f"{100 * m.accuracy:+.1f}" for m in (c.ar, *drafted) if m.accuracy is not None) or "-",
            f"{c.gained}, {c.lost}" if graded else "-",
            "-" if c.chance is None else f"{c.chance:.2f}",
            f"{100 * c.same_responses:.1f}",
            "-" if c.iterations_ratio is None else f"{c.iterations_ratio:.2f}",
            _times(m.tpf_ratio for m in drafted),
            _times(m.tps_ratio for m in (c.ar, *drafted)),
            _times(m.speedup_ratio for m in drafted),
        )
    return shown


def _times(ratios: Iterable[float]) -> str:
    return "  ".join(f"{ratio:.2f}" for ratio in ratios)


def accuracy_text(result: ModeResult) -> str:
    """Accuracy in percent with its interval."""
    if result.accuracy is None:
        return "not graded"
    interval = "" if result.interval is None else " ({:.1f} to {:.1f})".format(*(100 * x for x in result.interval))
    return f"{100 * result.accuracy:.1f}{interval}"
