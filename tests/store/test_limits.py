"""Extremes: full disks, lost permissions, vanished folders, wrong clocks, huge and empty rows, very many rows."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.store.conftest import make_trajectory, memory_folder
from trajectory_store import (
    InvalidTrajectoryError,
    Provenance,
    Round,
    StoreUnavailableError,
    Trajectory,
    TrajectoryStore,
)
from trajectory_store.local_files import host_name


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let every write past a size fail, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_committed_and_what_is_buffered(round_: Round, provenance: Provenance) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
        writer.commit()
        for i in range(50):
            writer.append(make_trajectory(f"b{i}", response_tokens=50))
        with file_size_limit(5000), pytest.raises(StoreUnavailableError, match="stays readable"):
            writer.commit()
        assert round_.committed_ids() == {"a"}
        assert not [name for name in round_.folder.entries() if name.startswith(".tmp-")]
        writer.append(make_trajectory("c"))
    # Space was made: the same writer published what it still held.
    assert len(round_.committed_ids()) == 52
    assert round_.seal(provenance).rows == 52


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")])
def test_the_reason_is_in_the_message(
    round_: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
        with monkeypatch.context() as patch:

            def refuse(descriptor: int) -> None:
                raise OSError(code, os.strerror(code))

            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StoreUnavailableError, match=message):
                writer.commit()
    assert round_.committed_ids() == {"a"}


FILL_THE_DISK = """
import sys
from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import StoreUnavailableError, TrajectoryStore
round_ = TrajectoryStore(sys.argv[1]).round(1)
with round_.writer(make_provenance()) as writer:
    writer.append(make_trajectory("a"))
    writer.commit()
    writer.append(make_trajectory("b", response_tokens=200_000))
    try:
        writer.commit()
    except StoreUnavailableError as error:
        print(error)
    writer.discard()
print(round_.committed_ids(), round_.seal(make_provenance()).rows)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 256 KiB, mounted in a name space of its own."""
    mounted = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    command = f"{mounted} && exec {sys.executable} -c '{FILL_THE_DISK}' {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, rest = done.stdout.splitlines()
    assert "No space left on device" in message
    assert "stays readable" in message
    assert rest == "{'a'} 1"


def test_lost_permission(provenance: Provenance) -> None:
    folder = Path(memory_folder())
    round_ = TrajectoryStore(folder).round(1)
    writer = round_.writer(provenance)
    writer.append(make_trajectory("a"))
    folder.chmod(0o755)
    Path(round_.folder.path).chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:  # who may write everywhere: be nobody for a moment
            os.seteuid(65534)
        with pytest.raises(StoreUnavailableError, match="Permission denied"):
            writer.commit()
    finally:
        if root:
            os.seteuid(0)
        Path(round_.folder.path).chmod(0o755)
    writer.close()
    assert round_.committed_ids() == {"a"}
    shutil.rmtree(folder)


def test_a_store_that_vanished_is_not_quietly_begun_again(round_: Round, provenance: Provenance) -> None:
    writer = round_.writer(provenance)
    writer.append(make_trajectory("a"))
    writer.commit()
    shutil.rmtree(round_.folder.path)
    writer.append(make_trajectory("b"))
    with pytest.raises(StoreUnavailableError, match="vanished"):
        writer.commit()
    assert not Path(round_.folder.path).exists()


def test_clocks_do_not_matter(tmp_path: Path, provenance: Provenance) -> None:
    """Machines with clocks decades apart write one round; nothing the store decides looks at a time."""
    hashes = []
    for stamps in ((0, 4_000_000_000), (4_000_000_000, 0)):
        round_ = TrajectoryStore(tmp_path / str(stamps[0])).round(1)
        for i, stamp in enumerate(stamps):
            with round_.writer(provenance, writer_id=f"w{i}") as writer:
                for seed in (1, 2):
                    writer.append(make_trajectory(f"p{seed}", seed=seed + i))
            for path in Path(round_.folder.path).iterdir():
                os.utime(path, (stamp, stamp))
        (Path(round_.folder.path) / ".tmp-elsewhere-1-aa-shard").write_bytes(b"of a machine that may still run")
        round_.writer(provenance)
        assert ".tmp-elsewhere-1-aa-shard" in round_.folder.entries()
        hashes.append(round_.seal(provenance).content_hash)
        assert ".tmp-elsewhere-1-aa-shard" not in round_.folder.entries()
    assert hashes[0] == hashes[1]


def test_debris_of_dead_processes_here_is_swept_by_the_next_writer(round_: Round, provenance: Provenance) -> None:
    round_.writer(provenance)
    round_.reject("a", "never answers")
    folders = [round_.folder, round_.folder.child("rejects")]
    for folder in folders:
        Path(folder.path, f".tmp-{host_name()}-4194999-aa-file").write_bytes(b"dead")
        Path(folder.path, f".tmp-{host_name()}-{os.getpid()}-aa-file").write_bytes(b"alive")
    round_.writer(provenance)
    for folder in folders:
        left = [name for name in folder.entries() if name.startswith(".tmp-")]
        assert left == [f".tmp-{host_name()}-{os.getpid()}-aa-file"]
    assert round_.rejects() == {"a": "never answers"}


def test_extreme_rows(round_: Round, provenance: Provenance) -> None:
    nothing = np.zeros(0, np.int32)
    rows = [
        Trajectory("empty response", np.array([1], np.int32), nothing, False, nothing, nothing, nothing),
        make_trajectory("long", response_tokens=100_000),
        make_trajectory("ünïcødé \N{SNOWMAN} / \\ \n"),
        Trajectory("largest token", np.array([2**31 - 1], np.int32), nothing, True, nothing, nothing, nothing),
    ]
    with round_.writer(provenance) as writer:
        for row in rows:
            writer.append(row)
    manifest = round_.seal(provenance)
    assert manifest.rows == 4
    reader = round_.reader()
    for row in rows:
        assert reader.find(row.prompt_id) == row


def test_a_row_without_a_prompt_is_refused(round_: Round, provenance: Provenance) -> None:
    """Its first token would be learned from whatever lies before it in a micro-batch."""
    nothing = np.zeros(0, np.int32)
    with pytest.raises(InvalidTrajectoryError, match="'a': the prompt is empty"):
        round_.writer(provenance).append(Trajectory("a", nothing, nothing, True, nothing, nothing, nothing))


def test_a_hundred_thousand_small_rows(round_: Round, provenance: Provenance) -> None:
    one = np.array([1], np.int32)
    nothing = np.zeros(0, np.int32)
    count = 100_000
    with round_.writer(provenance) as writer:
        for i in range(count):
            writer.append(Trajectory(f"{i:06d}", one, one, True, np.zeros(1, np.int32), nothing, nothing))
    assert round_.seal(provenance).rows == count
    reader = round_.reader()
    assert len(reader) == count
    for i in (0, 12_345, count - 1):
        assert reader[i].prompt_id == f"{i:06d}"
        assert reader.find(f"{i:06d}") == reader[i]
