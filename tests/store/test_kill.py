"""`kill -9` at every step of writing and sealing: nothing half-written is seen, nothing is lost or doubled."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.store.conftest import make_provenance, make_trajectory, memory_folder
from tests.store.kill_everywhere import IDS
from trajectory_store import TrajectoryStore

REPOSITORY = Path(__file__).parents[2]


def test_killed_at_every_step_it_recovers_to_the_same_round() -> None:
    folder = memory_folder()
    command = [sys.executable, "-m", "tests.store.kill_everywhere", folder, "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) > 100
    final = reports[-1]  # the one that was not killed
    assert final["committed"] == len(IDS)
    for report in reports:
        # Before anything was written there is no round yet; that is no damage.
        assert [bad for bad in report["bad_after_kill"] if "holds no round" not in bad] == [], report
        assert report["committed"] in (0, 2, 4, 6), report
        assert report["hash"] == final["hash"], report
        assert report["rows"] == sorted(IDS), report
        assert report["rejects"] == {"hopeless": "too long"}, report
        assert report["left"] == [], report
    assert {report["committed"] for report in reports} == {0, 2, 4, 6}


def _write_forever(url: str, writer_id: str) -> None:
    round_ = TrajectoryStore(url).round(1)
    with round_.writer(make_provenance(), writer_id=writer_id) as writer:
        number = 0
        while True:
            writer.append(make_trajectory(f"p{number % 60}"))
            number += 1
            if number % 3 == 0:
                writer.commit()


def test_writers_killed_at_random_while_others_write_the_same_prompts(tmp_path: Path) -> None:
    """Two processes publish the same prompts and both die; every published row is whole and counts once."""
    url = str(tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_forever, args=(url, f"w{i}"), daemon=True) for i in range(2)]
    for worker in workers:
        worker.start()
    round_ = TrajectoryStore(url).round(1)
    deadline = time.monotonic() + 60
    while len(round_.shard_names()) < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
    committed = round_.committed_ids()
    manifest = round_.seal(make_provenance())
    assert manifest.rows == len(committed) > 10
    assert sum(shard.rows for shard in manifest.shards) > manifest.rows
    assert list(round_.reader()) == [make_trajectory(i) for i in sorted(committed)]
    assert not [name for name in round_.folder.entries() if name.startswith(".tmp-")]
