"""Bringing MLflow up to what a run has put out: the parent run's figures and page, and the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from jf_cluster.config import Config
from jf_cluster.dashboard.gathered import gather, overview_path
from jf_cluster.dashboard.page import page
from jf_cluster.dashboard.registry import register
from jf_cluster.report import Row, write_report
from jf_cluster.tracking import Tracker
from jf_cluster.whole_files import write_whole


def show(config: Config, tracker: Tracker) -> list[Row]:
    """Write the report and the overview, and tell MLflow what is new; gives the report's rows.

    Derived from outputs alone: repeating it changes nothing, and what was made again replaces what was there.
    """
    rows = write_report(config)
    known = {name: tracker.parent.values_of(name) for name in _figures(rows)}
    for row in rows:
        new = {
            name: value
            for name, value in asdict(row).items()
            if name != "round" and value is not None and known[name].get(row.round) != value
        }
        if new:
            tracker.parent.metrics(new, step=row.round)
    last = config.newest_model()
    found = gather(config, tracker, last)
    path = overview_path(config)
    write_whole(path, page(found))
    for artifact in (path, config.run_dir / "report.json", config.run_dir / "config.yaml"):
        if artifact.is_file():
            tracker.parent.artifact(artifact)
    tracker.parent.flush()
    register(config, tracker, last)
    return rows


def _figures(rows: Sequence[Row]) -> set[str]:
    return {name for row in rows for name, value in asdict(row).items() if name != "round" and value is not None}
