"""The table a run ends with: one row a round, in the terminal and as report.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jf_cluster.config import Config
from jf_cluster.evaluate.comparison import compare, comparison_table, modes_table
from jf_cluster.evaluate.evaluation import evaluations_until, load_evaluation
from jf_cluster.whole_files import write_whole
from trajectory_store import TrajectoryStore

TABLE_WIDTH = 150


@dataclass(frozen=True)
class Row:
    """Model ``round`` (0 is the base): what collecting with it showed, how it decodes, what it took. None: not known.

    Block size, samples, iterations and ``seconds_collect`` are those of the trajectories this model generated, which
    the next round trains on.
    """

    round: int
    block_size: int | None
    samples: int | None
    iterations_per_block: float | None
    tpf_jacobi: float | None
    tpf_multiblock: float | None
    tps_ar: float | None
    tps_jacobi: float | None
    tps_multiblock: float | None
    tps_strongest_ar: float | None
    accuracy_ar: float | None
    accuracy_jacobi: float | None
    accuracy_multiblock: float | None
    agreement_with_base: float | None
    seconds_collect: float | None
    seconds_train: float | None


def rows_of(config: Config) -> list[Row]:
    """Give a row for every model that was evaluated or has collected."""
    found = (_row(config, round_number) for round_number in range(config.newest_model() + 1))
    return [row for row in found if row is not None]


def _row(config: Config, round_number: int) -> Row | None:
    evaluation = load_evaluation(config, round_number)
    folder = TrajectoryStore(config.store_url).round(round_number + 1)
    manifest = folder.manifest if folder.is_sealed else None
    if evaluation is None and manifest is None:
        return None
    return Row(
        round=round_number,
        block_size=manifest.provenance.block_size if manifest else None,
        samples=manifest.rows if manifest else None,
        iterations_per_block=manifest.iterations_per_block if manifest else None,
        tpf_jacobi=evaluation.jacobi.tpf if evaluation else None,
        tpf_multiblock=evaluation.multiblock.tpf if evaluation else None,
        tps_ar=evaluation.ar.tps if evaluation else None,
        tps_jacobi=evaluation.jacobi.tps if evaluation else None,
        tps_multiblock=evaluation.multiblock.tps if evaluation else None,
        tps_strongest_ar=evaluation.strongest_ar_tps if evaluation else None,
        accuracy_ar=evaluation.ar.accuracy if evaluation else None,
        accuracy_jacobi=evaluation.jacobi.accuracy if evaluation else None,
        accuracy_multiblock=evaluation.multiblock.accuracy if evaluation else None,
        agreement_with_base=evaluation.agreement_with_base if evaluation else None,
        seconds_collect=_seconds(config.run_dir / "collecting" / f"round-{round_number + 1:03d}.json"),
        seconds_train=0.0
        if round_number == 0
        else _seconds(config.run_dir / "training" / f"round-{round_number:03d}.json"),
    )


def _seconds(path: Path) -> float | None:
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else None


def write_report(config: Config) -> list[Row]:
    """Write report.json in one atomic step and give its rows."""
    rows = rows_of(config)
    write_whole(config.run_dir / "report.json", json.dumps({"rounds": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


def table(rows: list[Row]) -> Table:
    """The rows as a table for people; figures of several decoding modes share a column."""
    shown = Table(title="Rounds (0 is the base model)", title_justify="left")
    for name in (
        "round",
        "block\nsize",
        "samples",
        "iterations\nper block",
        "tokens/forward\nJacobi, multi",
        "tokens/second\nAR, Jacobi, multi",
        "speed-up\nJacobi, multi",
        "accuracy %\nAR, Jacobi, multi",
        "agrees with\nbase %",
        "collect\ns",
        "train\ns",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            str(row.round),
            _figures(0, row.block_size),
            _figures(0, row.samples),
            _figures(2, row.iterations_per_block),
            _figures(2, row.tpf_jacobi, row.tpf_multiblock),
            _figures(0, row.tps_ar, row.tps_jacobi, row.tps_multiblock),
            _figures(2, *(_ratio(tps, row.tps_strongest_ar) for tps in (row.tps_jacobi, row.tps_multiblock))),
            _figures(1, *map(_percent, (row.accuracy_ar, row.accuracy_jacobi, row.accuracy_multiblock))),
            _figures(1, _percent(row.agreement_with_base)),
            _figures(0, row.seconds_collect),
            _figures(0, row.seconds_train),
        )
    return shown


MARKDOWN_COLUMNS = (
    *("round", "block size", "samples", "iterations per block", "TPF Jacobi", "TPF multi-block"),
    *("TPS AR", "TPS Jacobi", "TPS multi-block", "speed-up", "accuracy", "agreement with base"),
    *("seconds collect", "seconds train"),
)


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, one figure a column: speed-up is Jacobi decoding's, accuracy AR's."""
    lines = [MARKDOWN_COLUMNS, ("---",) * len(MARKDOWN_COLUMNS)]
    for row in rows:
        shares = (_percent(share) for share in (row.accuracy_ar, row.agreement_with_base))
        lines.append(
            (
                str(row.round),
                _figures(0, row.block_size),
                _figures(0, row.samples),
                _figures(2, row.iterations_per_block),
                _figures(2, row.tpf_jacobi),
                _figures(2, row.tpf_multiblock),
                _figures(0, row.tps_ar),
                _figures(0, row.tps_jacobi),
                _figures(0, row.tps_multiblock),
                _figures(2, _ratio(row.tps_jacobi, row.tps_strongest_ar)),
                *("-" if share is None else f"{share:.1f}%" for share in shares),
                _figures(0, row.seconds_collect),
                _figures(0, row.seconds_train),
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(rows: list[Row]) -> None:
    """Show the table; a narrow terminal or a log gets it whole rather than cut."""
    Console(width=max(Console().width, TABLE_WIDTH)).print(table(rows))


def print_evaluation(config: Config, round_number: int, *, beside: bool = False) -> None:
    """Show how a model decodes in every mode, and how it differs from every earlier one; see ``load_evaluation``."""
    if (now := load_evaluation(config, round_number, beside=beside)) is None:
        return
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(modes_table(now))
    if earlier := evaluations_until(config, round_number - 1, beside=beside):
        # Not those of the file: an earlier version's has none.
        console.print(comparison_table([compare(now, before) for before in earlier]))


def _figures(digits: int, *values: float | None) -> str:
    return "  ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
