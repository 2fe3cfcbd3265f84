"""How ``make test`` shares the tests out between processes: what belongs into one, and what comes first."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

# Three Rays that start beside each other on two slow cores take longer than the minute Ray gives them.
os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "240")
# A Ray that many tests share has hundreds of logs, and looks twice a second whether there are more.
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "3")

FIXED_PORTS = "what people type"
TOGETHER = {
    # The cluster's dashboard, the model server and MLflow have one port each there: one after the other.
    "tests/docs/test_docs.py::test_every_shell_block_runs": FIXED_PORTS,
    # What is compared with an undisturbed chain, which takes minutes: beside the others of their folder.
    **{f"tests/flow/test_{what}.py": "chain" for what in ("chain", "full_disk")},
    # Folders whose tests share a Ray, ranks or a server; elsewhere the tests of a file share what they need.
    **{f"tests/{folder}/": folder for folder in ("flow", "train", "deploy", "inference", "dashboard")},
}
"""How the id of a test begins → the group it belongs to, the longest groups first; they are begun in this order."""


def _group(nodeid: str) -> str:
    return next((group for start, group in TOGETHER.items() if nodeid.startswith(start)), nodeid.split("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Groups of its own (--dist loadgroup) pytest-xdist 3.8 writes where pytest 9.2 no longer reads them.
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False  # it would begin with the group of most tests, not with the longest
    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        order = list(dict.fromkeys(TOGETHER.values()))
        items.sort(key=lambda item: order.index(_group(item.nodeid)) if _group(item.nodeid) in order else len(order))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what failed, not only at the end, which a run that is cut off does not see."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stdout.write(f"\n{report.nodeid} failed ({report.when}):\n{report.longreprtext[-2000:]}\n")
        sys.stdout.flush()
