"""Compaction: same rows, fewer files, at any moment whole, under readers that notice nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.store.conftest import make_trajectory
from trajectory_store import (
    MissingShardError,
    Provenance,
    Round,
    RoundNotSealedError,
    StoreError,
    StoreUnavailableError,
    TrajectoryFeed,
)
from trajectory_store.__main__ import main
from trajectory_store.compact import compact_round
from trajectory_store.folder import Folder
from trajectory_store.verify import verify_round

IDS = [f"p{i:03d}" for i in range(60)]


@pytest.fixture
def sealed(round_: Round, provenance: Provenance) -> Round:
    for part in range(20):
        with round_.writer(provenance, writer_id=f"w{part}") as writer:
            for prompt_id in [*IDS[part::20], IDS[0]]:
                writer.append(make_trajectory(prompt_id))
    round_.reject("x", "too long")
    round_.seal(provenance)
    return round_


def test_rows_and_hash_stay(sealed: Round) -> None:
    before = sealed.manifest
    after = compact_round(sealed)
    assert len(before.shards) == 20
    assert len(after.shards) == 1
    assert sealed.manifest == after
    for name in ("rows", "response_tokens", "blocks", "iterations", "rejects", "content_hash", "created_at"):
        assert getattr(after, name) == getattr(before, name)
    assert list(sealed.reader()) == list(sealed.reader().scan()) == [make_trajectory(i) for i in IDS]
    assert list(verify_round(sealed)) == []
    assert len(sealed.shard_names()) == 1
    again = compact_round(sealed)
    assert again.content_hash == after.content_hash and len(again.shards) == 1


def test_readers_go_on_while_it_happens(sealed: Round) -> None:
    expected = [make_trajectory(i) for i in IDS]
    by_row, scanning, fed = sealed.reader(cache_bytes=0), sealed.reader(), sealed.reader(cache_bytes=0)
    rows, scan = [by_row[i] for i in range(10)], scanning.scan()
    scanned = [next(scan) for _ in range(10)]
    feed = TrajectoryFeed(fed, seed=0, samples=7, threads=3)
    steps = iter(feed)
    trained = list(next(steps).trajectories)
    compact_round(sealed)
    rows += [by_row[i] for i in range(10, 60)]
    scanned += scan
    trained += [trajectory for step in steps for trajectory in step.trajectories]
    feed.close()
    assert rows == expected
    assert sorted(scanned, key=lambda t: t.prompt_id) == expected
    assert sorted(trained, key=lambda t: t.prompt_id) == expected


def test_threads_read_through_repeated_compactions(sealed: Round) -> None:
    expected = [make_trajectory(i) for i in IDS]
    failures: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            got = list(sealed.reader(cache_bytes=0))
            if got != expected:
                failures.append(got)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for shard_bytes in (1, 5000, 1 << 20, 3000):
        compact_round(sealed, shard_bytes)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_compactions_at_once_leave_one_whole_round(sealed: Round) -> None:
    """Whoever loses says so and takes its own files away, none of the winner's."""

    def compact(shard_bytes: int) -> bool:
        barrier.wait()
        try:
            compact_round(sealed, shard_bytes)
        except StoreError as error:
            assert "meanwhile" in str(error)
            return False
        return True

    for _ in range(10):
        barrier = threading.Barrier(3)
        with ThreadPoolExecutor(3) as pool:
            assert any(pool.map(compact, (1, 3000, 1 << 20)))
        assert list(sealed.reader()) == [make_trajectory(i) for i in IDS]
        assert list(verify_round(sealed)) == []


def test_a_shard_that_is_really_gone_is_missed(sealed: Round) -> None:
    (Path(sealed.folder.path) / sealed.manifest.shards[3].name).unlink()
    with pytest.raises(MissingShardError):
        list(sealed.reader())
    with pytest.raises(MissingShardError):
        compact_round(sealed)


@pytest.mark.parametrize("written", range(2))
def test_one_that_fails_takes_its_shards_away(sealed: Round, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Else every try on a full disk would leave it fuller."""
    files = sealed.folder.entries()
    publish, left = Folder.publish, written

    def full_after_some(self: Folder, name: str, content: object) -> None:
        nonlocal left
        if left == 0:
            raise StoreUnavailableError("No space left on device")
        left -= 1
        publish(self, name, content)

    monkeypatch.setattr(Folder, "publish", full_after_some)
    with pytest.raises(StoreUnavailableError, match="No space"):
        compact_round(sealed, shard_bytes=1)
    assert sealed.folder.entries() == files


@pytest.mark.parametrize("step", range(4))
def test_interrupted_anywhere_the_round_is_whole(sealed: Round, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stopped before the k-th file appears (shard, index, manifest) or, with all published, before the first delete."""
    done = 0

    def stopping(action: Callable[..., object]) -> Callable[..., object]:
        def stop_or_do(self: Folder, name: str, *arguments: object) -> object:
            nonlocal done
            if done == step:
                raise StoreUnavailableError("stopped")
            done += 1
            return action(self, name, *arguments)

        return stop_or_do

    with monkeypatch.context() as patch, pytest.raises(StoreUnavailableError):
        for action in (Folder.publish, Folder.replace, Folder.delete):
            patch.setattr(Folder, action.__name__, stopping(action))
        compact_round(sealed)
    assert list(sealed.reader()) == [make_trajectory(i) for i in IDS]
    assert [f for f in verify_round(sealed) if f.severity == "bad"] == []
    compact_round(sealed)
    assert list(verify_round(sealed)) == []
    assert len(sealed.shard_names()) == 1


def test_only_sealed_rounds(round_: Round) -> None:
    with pytest.raises(RoundNotSealedError):
        compact_round(round_)


def test_the_command(sealed: Round, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", sealed.folder.path]) == 0
    assert "20 shards to 1" in capsys.readouterr().out
