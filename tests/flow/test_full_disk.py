"""A disk that fills while a run works: one message, an exit code, nothing half-written, and the same command goes on.

The disk is a small file system in a mount namespace of its own, in which the commands and their Ray run.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jf_cluster.config import Config
from jf_cluster.models import model_hash
from jf_cluster.train.checkpoints import whole_checkpoints
from jf_cluster.whole_files import named_when_full, write_whole
from tests.flow.conftest import ROOT, chain_config, run
from trajectory_store import TrajectoryStore

BYTES = 64 << 20


class Disk:
    """A file system of 64 MiB that only this class and the commands it runs can see."""

    def __init__(self, mount_point: Path) -> None:
        mount_point.mkdir()
        script = f'mount -t tmpfs -o size={BYTES} tmpfs "{mount_point}" && echo mounted && exec sleep 3600'
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        self.mounted = self._holder.stdout.readline() == "mounted\n"
        self.root = Path(f"/proc/{self._holder.pid}/root{mount_point}")
        """Where this process sees it."""

    def command(self, command: list[str]) -> list[str]:
        return [
            *("nsenter", f"--target={self._holder.pid}", "--user", "--mount", "--preserve-credentials"),
            *(f"--wd={ROOT}", *command),
        ]

    def fill(self, leave: int) -> None:
        """Take all space but ``leave`` bytes."""
        piece, state = bytes(1 << 16), os.statvfs(self.root)
        take = state.f_bavail * state.f_frsize - leave if leave else BYTES
        with (self.root / "ballast").open("ab", buffering=0) as ballast:
            for _ in range(take // len(piece) + 1):
                try:
                    ballast.write(piece)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    return

    def make_room(self) -> None:
        (self.root / "ballast").unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    if not disk.mounted:
        pytest.skip("namespaces are not allowed on this system")
    yield disk
    disk.close()


def _run_until_full(
    disk: Disk, command: list[str], ready: Callable[[], bool], leave: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command whose disk is filled, but for ``leave`` bytes, as soon as it is ``ready``."""

    def watch() -> None:
        while not ready():
            time.sleep(0.005)
        disk.fill(leave)

    threading.Thread(target=watch, daemon=True).start()
    return run(*disk.command(command), timeout_s=400)


def _check_message(done: subprocess.CompletedProcess[str], where: Path) -> None:
    """The last thing said is one line with what and where, and nothing before it looks like a bug."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1], done.stderr
    assert "No space left on device" in errors[0] and str(where) in errors[0]
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr


def _unfinished(run_dir: Path) -> list[str]:
    names = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")]
    return [name for name in names if ".tmp" in name or "partial" in name]


@pytest.mark.slow
def test_a_disk_that_fills_stops_the_run_and_the_same_command_goes_on(
    disk: Disk, undisturbed: tuple[Config, str], tmp_path: Path, base_model: Path
) -> None:
    config = chain_config(tmp_path / "disk" / "runs", base_model, collect__workers=1)
    settings = tmp_path / "small.yaml"
    settings.write_text(config.to_yaml())
    command = [sys.executable, "jobs/train.py", "--config", str(settings)]
    run_dir = disk.root / "runs" / "small"
    trajectories, checkpoints = run_dir / "store" / "round-001", run_dir / "checkpoints" / "round-001"

    collecting = _run_until_full(disk, command, lambda: any(trajectories.glob("shard-*")))
    _check_message(collecting, Path(config.store_url))
    folder = TrajectoryStore(trajectories.parent).round(1)
    kept = folder.committed_ids()
    assert 0 < len(kept) < 20 and not folder.is_sealed and not _unfinished(run_dir)

    disk.make_room()
    whole = undisturbed[0]
    weights = (Path(whole.model_dir(1)) / "model.safetensors").stat().st_size
    # Filled while the ranks start, with room for one checkpoint (weights and two moments) and not for two.
    training = _run_until_full(disk, command, checkpoints.exists, leave=5 * weights)
    _check_message(training, config.run_dir / "checkpoints")
    assert "restart" not in training.stderr, "what no restart mends"
    assert folder.is_sealed and folder.committed_ids() >= kept
    assert [c.step for c in whole_checkpoints(checkpoints)] == [2]
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step-000002"]
    assert not _unfinished(run_dir)

    disk.make_room()
    done = run(*disk.command(command), timeout_s=400)
    assert done.returncode == 0, done.stderr
    assert folder.manifest.content_hash == TrajectoryStore(whole.store_url).round(1).manifest.content_hash
    assert model_hash(str(run_dir / "models" / "round-001")) == model_hash(whole.model_dir(1))


LIBRARIES = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from jf_cluster.whole_files import named_when_full

weights = {"weight": torch.zeros(1 << 22)}
for write in (save_file, torch.save):
    place = Path(sys.argv[1]) / write.__name__
    try:
        with named_when_full(place):
            write(weights, place)
    except OSError as error:
        print(error)
"""


def test_whatever_a_library_makes_of_a_full_disk_names_the_file(disk: Disk, tmp_path: Path) -> None:
    """What safetensors and torch raise is not an OSError; a failure of another kind stays what it is."""
    (disk.root / "ballast").write_bytes(bytes(BYTES - (8 << 20)))
    done = run(*disk.command([sys.executable, "-c", LIBRARIES, str(tmp_path / "disk")]))
    assert done.stdout.splitlines() == [
        f"[Errno 28] No space left on device: '{tmp_path / 'disk' / name}'" for name in ("save_file", "save")
    ], done.stderr
    with pytest.raises(ValueError, match="another matter"), named_when_full(tmp_path):
        raise ValueError("another matter")


def test_a_small_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    write_whole(path, "before")
    path.with_name(f".figures.json.{os.getpid()}-{threading.get_ident()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_whole(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_a_small_file_may_be_written_by_several_at_once(tmp_path: Path) -> None:
    path, texts = tmp_path / "figures.json", ["a" * 5000, "b" * 9000]

    def write(text: str) -> None:
        for _ in range(100):
            write_whole(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, texts))
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
