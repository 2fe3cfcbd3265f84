"""The store on S3: a real S3-compatible server (moto) on loopback, reached through pyarrow's own S3 client."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import (
    CorruptShardError,
    MissingShardError,
    Provenance,
    Round,
    RoundSealedError,
    StoreUnavailableError,
    TrajectoryFeed,
    TrajectoryStore,
)
from trajectory_store.__main__ import main
from trajectory_store.compact import compact_round
from trajectory_store.folder import Folder
from trajectory_store.state import announce_seal
from trajectory_store.verify import verify_round

moto_s3_backends = pytest.importorskip("moto.s3.models").s3_backends
DEFAULT_ACCOUNT_ID = pytest.importorskip("moto.core").DEFAULT_ACCOUNT_ID


def write(round_: Round, provenance: Provenance, ids: list[str], **options: object) -> None:
    with round_.writer(provenance, **options) as writer:  # type: ignore[arg-type]
        for prompt_id in ids:
            writer.append(make_trajectory(prompt_id))


def test_a_round_lives_on_s3(
    s3: Round, s3_url: str, provenance: Provenance, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TrajectoryStore(s3_url).rounds() == []
    assert s3.committed_ids() == set()
    ids = [f"p{i:02d}" for i in range(20)]
    write(s3, provenance, ids[::2])
    write(s3, provenance, ids[1::2])
    s3.reject("x", "too long")
    assert s3.committed_ids() == set(ids)
    assert s3.rejects() == {"x": "too long"}
    manifest = s3.seal(provenance)
    assert (manifest.rows, manifest.rejects) == (20, 1)
    assert list(s3.reader()) == [make_trajectory(i) for i in ids]
    assert [r.number for r in TrajectoryStore(s3_url).rounds()] == [1]
    assert list(verify_round(s3)) == []
    assert main(["ls", s3_url]) == 0
    assert "20 rows" in capsys.readouterr().out
    with pytest.raises(RoundSealedError):
        s3.writer(provenance)


def test_the_same_rows_hash_the_same_on_s3_and_on_disk(s3: Round, round_: Round, provenance: Provenance) -> None:
    for place in (s3, round_):
        write(place, provenance, ["a", "b", "c"])
    assert s3.seal(provenance).content_hash == round_.seal(provenance).content_hash


def test_many_writers_at_once(s3: Round, provenance: Provenance) -> None:
    def work(number: int) -> None:
        write(s3, provenance, [f"p{i}" for i in range(number, number + 10)], writer_id=f"w{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    manifest = s3.seal(provenance)
    assert manifest.rows == 25
    assert sum(shard.rows for shard in manifest.shards) == 160


def test_a_listing_of_thousands_of_shards(s3: Round, provenance: Provenance) -> None:
    """Several pages (1,000 keys each) of S3's listing; the objects are put into the server by its own backend."""
    write(s3, provenance, ["a"])
    bucket, _, prefix = s3.folder.path.partition("/")
    backend = moto_s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for i in range(3000):
        backend.put_object(bucket, f"{prefix}/shard-w{i}-000000-{i:032x}.arrow", b"x")
    assert len(s3.shard_names()) == 3001


def test_an_exception_while_uploading_publishes_nothing(s3: Round, provenance: Provenance) -> None:
    with pytest.raises(RuntimeError), s3.writer(provenance) as writer:
        writer.append(make_trajectory("lost"))
        raise RuntimeError
    assert s3.shard_names() == []


def test_damage_is_named(s3: Round, provenance: Provenance) -> None:
    write(s3, provenance, [f"p{i}" for i in range(30)])
    s3.seal(provenance)
    name = s3.manifest.shards[0].name
    content = bytearray(bytes(s3.folder.read(name)))
    content[len(content) // 2] ^= 4
    s3.folder.publish(name, bytes(content))
    assert [finding.name for finding in verify_round(s3)] == [name]
    with pytest.raises(CorruptShardError, match=name):
        list(s3.reader())
    s3.folder.delete(name)
    with pytest.raises(MissingShardError, match=name):
        list(s3.reader())


def test_a_feed_streams_from_s3(s3: Round, provenance: Provenance) -> None:
    for part in range(4):
        write(s3, provenance, [f"p{part}-{i}" for i in range(25)])
    s3.seal(provenance)
    reader = s3.reader(cache_bytes=20_000)
    with TrajectoryFeed(reader, seed=1, samples=10, threads=4, prefetch_steps=3) as feed:
        ids = [t.prompt_id for step in feed for t in step.trajectories]
    assert sorted(ids) == sorted(f"p{part}-{i}" for part in range(4) for i in range(25))


def test_a_server_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url = "s3://nowhere/store?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    with pytest.raises(StoreUnavailableError, match=r"cannot open nowhere/store/round-001/.*Could not connect"):
        TrajectoryStore(url).round(1).writer(make_provenance())


def test_a_bucket_that_vanished_is_reported(s3: Round, provenance: Provenance) -> None:
    with s3.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
        bucket = s3.folder.path.partition("/")[0]
        backend = moto_s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for key in list(backend.buckets[bucket].keys):
            backend.delete_object(bucket, key)
        backend.delete_bucket(bucket)
        with pytest.raises(StoreUnavailableError, match="round-001"):
            writer.commit()
        writer.discard()


def test_a_request_that_fails_is_no_damage(s3: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made again; when it goes on failing that is said, and the shard is not called damaged."""
    write(s3, provenance, ["a", "b"])
    s3.seal(provenance)
    monkeypatch.setattr("time.sleep", lambda _: None)
    original, failing = Folder.open, 0

    def fail_a_while(folder: Folder, name: str) -> object:
        nonlocal failing
        caller = sys._getframe(1).f_code.co_name
        if name.startswith("shard-") and caller == "_open" and failing:
            failing -= 1
            raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation")
        return original(folder, name)

    monkeypatch.setattr(Folder, "open", fail_a_while)
    failing = 2
    assert [t.prompt_id for t in s3.reader()] == ["a", "b"]
    failing = 3
    with pytest.raises(StoreUnavailableError, match="is intact, but"):
        list(s3.reader())


@pytest.mark.parametrize("change", ["seal", "compact"])
def test_a_manifest_replaced_while_it_is_read(
    s3: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for i in range(3):
        write(s3, provenance, [f"p{i}"], writer_id=f"w{i}")
    if change == "compact":
        s3.seal(provenance)
    else:
        announce_seal(s3.folder)
    original = Folder.open

    def open_and_replace(folder: Folder, name: str) -> object:
        file = original(folder, name)
        if name == "manifest.json":
            monkeypatch.setattr(Folder, "open", original)
            # Shards with longer names, so that the manifest becomes longer than the one whose length was asked for.
            compact_round(s3, shard_bytes=1) if change == "compact" else s3.seal(provenance)
        return file

    monkeypatch.setattr(Folder, "open", open_and_replace)
    assert s3.manifest.rows == 3


def test_bytes_that_arrive_damaged_are_fetched_again(
    s3: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(s3, provenance, ["a"])
    s3.seal(provenance)
    monkeypatch.setattr("time.sleep", lambda _: None)
    answers = iter(["tails", None])
    monkeypatch.setattr("trajectory_store.shard.damaged_column", lambda *_: next(answers))
    assert [t.prompt_id for t in s3.reader()] == ["a"]


def test_an_index_that_finds_no_room_here_is_reported(
    s3: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(s3, provenance, ["a"])
    s3.seal(provenance)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StoreUnavailableError, match=r"index-.*TMPDIR"):
        s3.reader()


STREAM = """
import sys
import pyarrow as pa
from trajectory_store import TrajectoryFeed, TrajectoryStore
reader = TrajectoryStore(sys.argv[1]).round(1).reader(cache_bytes=2 << 20)
with TrajectoryFeed(reader, seed=0, samples=4, prefetch_steps=2, threads=2) as feed:
    rows = sum(len(step.rows) for step in feed)
print(rows, pa.default_memory_pool().max_memory())
"""


def test_streaming_takes_memory_that_does_not_grow_with_the_store(s3_url: str, provenance: Provenance) -> None:
    """Peak of Arrow's memory in a process that reads a whole round from S3, in random order, reading ahead."""
    row = make_trajectory("row", response_tokens=20_000)
    peaks, sizes = [], []
    for name, count in (("small", 30), ("large", 240)):
        address = s3_url.replace("/runs/store", f"/runs/{name}")
        round_ = TrajectoryStore(address).round(1)
        with round_.writer(provenance, codec="none", shard_bytes=4 << 20) as writer:
            for i in range(count):
                writer.append(replace(row, prompt_id=f"{i:04d}"))
        sizes.append(round_.seal(provenance).bytes)
        command = [sys.executable, "-c", STREAM, address]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], timeout=300
        )
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert sizes[1] > 7 * sizes[0]
    assert peaks[1] < 1.25 * peaks[0] + (1 << 20), (sizes, peaks)
    assert peaks[1] < sizes[1] / 2, (sizes, peaks)
