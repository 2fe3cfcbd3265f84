"""A round's life: writing, committing, rejecting, sealing, reading."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import (
    InvalidNameError,
    InvalidTrajectoryError,
    Provenance,
    ProvenanceMismatchError,
    Round,
    RoundNotFoundError,
    RoundNotSealedError,
    RoundSealedError,
    StoreError,
    TrajectoryStore,
)
from trajectory_store.commands import named_round
from trajectory_store.folder import Folder


def write(round_: Round, provenance: Provenance, ids: list[str], **options: object) -> None:
    with round_.writer(provenance, **options) as writer:  # type: ignore[arg-type]
        for prompt_id in ids:
            writer.append(make_trajectory(prompt_id))


def test_rows_come_back_in_order_of_prompt_id(round_: Round, provenance: Provenance) -> None:
    ids = [f"prompt-{i:03d}" for i in range(100)]
    write(round_, provenance, ids[1::2], writer_id="b")
    write(round_, provenance, ids[0::2][::-1], writer_id="a")
    manifest = round_.seal(provenance)
    reader = round_.reader()
    expected = [make_trajectory(i) for i in ids]
    assert [reader[i] for i in range(len(reader))] == expected
    assert list(reader) == expected
    assert reader[-1] == expected[-1]
    scanned = list(reader.scan())
    assert sorted(t.prompt_id for t in scanned) == ids
    assert set(scanned) == set(expected)
    assert reader.prompt_lengths.tolist() == [len(t.prompt) for t in expected]
    assert reader.response_lengths.tolist() == [len(t.response) for t in expected]
    assert reader.find("prompt-042") == expected[42]
    assert reader.find("nobody") is None
    assert reader[0].tails.dtype == np.int32
    assert (manifest.rows, manifest.response_tokens) == (100, sum(len(t.response) for t in expected))
    assert manifest.blocks == sum(len(t.iterations) for t in expected)
    assert manifest.iterations == sum(len(t.accepted) for t in expected)
    assert manifest.provenance == provenance
    with pytest.raises(IndexError):
        reader[100]


def test_nothing_is_created_before_something_is_written(store: TrajectoryStore, tmp_path: Path) -> None:
    assert store.rounds() == []
    assert store.round(3).committed_ids() == set()
    assert not store.round(3).is_sealed
    assert store.round(3).rejects() == {}
    assert not (tmp_path / "store").exists()
    with pytest.raises(RoundNotSealedError):
        store.round(3).reader()
    with pytest.raises(RoundNotFoundError):
        _ = store.round(3).provenance


def test_the_content_hash_does_not_depend_on_how_the_work_was_spread(tmp_path: Path, provenance: Provenance) -> None:
    ids = [f"p{i}" for i in range(40)]
    one, many = TrajectoryStore(tmp_path / "one").round(1), TrajectoryStore(tmp_path / "many").round(1)
    write(one, provenance, ids)
    for part in range(5):
        write(many, provenance, ids[part::5] + ids[:3], writer_id=f"w{part}", shard_bytes=2000)
    first, second = one.seal(provenance), many.seal(provenance)
    assert len(second.shards) > 5
    assert first.content_hash == second.content_hash
    assert list(one.reader()) == list(many.reader())
    other = TrajectoryStore(tmp_path / "other").round(1)
    write(other, provenance, ids[:-1])
    assert other.seal(provenance).content_hash != first.content_hash


def test_the_same_prompt_twice_counts_once(tmp_path: Path, provenance: Provenance) -> None:
    """Also when the two differ (low precision), and whichever came first."""
    versions = [make_trajectory("p", seed) for seed in (1, 2)]
    kept = []
    for order in (versions, versions[::-1]):
        round_ = TrajectoryStore(tmp_path / str(len(kept))).round(1)
        for number, version in enumerate(order):
            with round_.writer(provenance, writer_id=f"w{number}") as writer:
                writer.append(version)
        assert round_.seal(provenance).rows == 1
        kept.append(round_.reader()[0])
    assert kept[0] == kept[1]


def test_a_writer_ignores_an_id_it_has_buffered(round_: Round, provenance: Provenance) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("p"))
        writer.append(make_trajectory("p"))
    assert writer.committed_rows == 1


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_arrays_may_be_reused_once_they_are_appended(round_: Round, provenance: Provenance, dtype: type) -> None:
    expected = make_trajectory("p", response_tokens=20)
    response = expected.response.astype(dtype)
    with round_.writer(provenance) as writer:
        writer.append(replace(expected, response=response))
        response[:] = 0
    round_.seal(provenance)
    assert round_.reader()[0] == expected


def test_an_exception_publishes_nothing(round_: Round, provenance: Provenance) -> None:
    with pytest.raises(RuntimeError, match="generation failed"), round_.writer(provenance) as writer:
        writer.append(make_trajectory("lost"))
        raise RuntimeError("generation failed")
    assert round_.shard_names() == []
    assert round_.committed_ids() == set()
    with pytest.raises(StoreError, match="closed"):
        writer.append(make_trajectory("late"))


def test_what_was_committed_before_an_exception_stays(round_: Round, provenance: Provenance) -> None:
    with pytest.raises(RuntimeError), round_.writer(provenance) as writer:
        writer.append(make_trajectory("kept"))
        writer.commit()
        writer.append(make_trajectory("lost"))
        raise RuntimeError
    assert round_.committed_ids() == {"kept"}


def test_an_invalid_trajectory_leaves_the_buffer_usable(round_: Round, provenance: Provenance) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
        with pytest.raises(InvalidTrajectoryError):
            writer.append(make_trajectory("b", response_tokens=9, block_size=4))
        writer.append(make_trajectory("c"))
    assert round_.committed_ids() == {"a", "c"}


def test_shards_close_by_size_and_age(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, [f"p{i}" for i in range(4)], shard_age_s=0.0)
    assert len(round_.shard_names()) == 4
    rows = [make_trajectory(f"q{i}", response_tokens=20_000) for i in range(8)]
    with round_.writer(provenance, shard_bytes=100_000) as writer:
        for row in rows:
            writer.append(row)
    assert len(round_.shard_names()) > 6
    round_.seal(provenance)
    assert round_.reader().find("q7") == rows[7]


def test_committed_ids_see_new_shards(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, ["a", "b"])
    assert round_.committed_ids() == {"a", "b"}
    write(round_, provenance, ["c"])
    assert round_.committed_ids() == {"a", "b", "c"}
    assert pickle.loads(pickle.dumps(round_)).committed_ids() == {"a", "b", "c"}


def test_whether_a_prompt_is_committed_is_looked_up(
    round_: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
    assert round_.has_committed("a")
    scanned = []
    monkeypatch.setattr(pc, "index", lambda ids, prompt_id: scanned.append(prompt_id))
    assert not any(round_.has_committed(f"b{number}") for number in range(100))
    assert not scanned, "the ids are not gone through for each prompt"
    monkeypatch.undo()
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("b"))
    elsewhere = pickle.loads(pickle.dumps(round_))
    assert round_.has_committed("b") and elsewhere.has_committed("a") and not elsewhere.has_committed("c")


def test_rejects_are_kept_once_and_counted(round_: Round, provenance: Provenance) -> None:
    round_.reject("../../etc/passwd", "too long")
    round_.reject("../../etc/passwd", "another reason")
    round_.reject("ok after all", "worker died")
    write(round_, provenance, ["ok after all"])
    assert round_.rejects() == {"../../etc/passwd": "too long", "ok after all": "worker died"}
    assert round_.seal(provenance).rejects == 1


def test_a_sealed_round_takes_nothing_more(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, ["a"])
    late = round_.writer(provenance)
    late.append(make_trajectory("late"))
    manifest = round_.seal(provenance)
    assert round_.seal(provenance) == manifest
    for attempt in (late.commit, lambda: round_.writer(provenance), lambda: round_.reject("b", "x")):
        with pytest.raises(RoundSealedError):
            attempt()
    assert [t.prompt_id for t in round_.reader()] == ["a"]


@pytest.mark.parametrize("change", [{"model_hash": "m1"}, {"tokenizer_hash": "t1"}, {"block_size": 16}, {"seed": 8}])
def test_another_origin_is_refused(round_: Round, provenance: Provenance, change: dict[str, object]) -> None:
    write(round_, provenance, ["a"])
    other = make_provenance(**change)
    with pytest.raises(ProvenanceMismatchError, match=next(iter(change))):
        round_.writer(other)
    with pytest.raises(ProvenanceMismatchError):
        round_.seal(other)
    round_.seal(provenance)
    with pytest.raises(ProvenanceMismatchError):
        round_.seal(other)


def test_restarting_with_other_code_or_workers_is_fine(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, ["a"])
    write(round_, make_provenance(code_version="newer", config={}), ["b"])
    assert round_.seal(provenance).rows == 2


def test_an_empty_round_can_be_sealed(round_: Round, provenance: Provenance) -> None:
    assert round_.seal(provenance).rows == 0
    reader = round_.reader()
    assert len(reader) == 0
    assert list(reader) == []
    assert list(reader.scan()) == []
    assert reader.find("a") is None


@pytest.mark.parametrize("number", [0, -1])
def test_rounds_count_from_one(store: TrajectoryStore, number: int) -> None:
    with pytest.raises(InvalidNameError):
        store.round(number)


@pytest.mark.parametrize("writer_id", ["", "a/b", "..\\x", "a-b", "x" * 100])
def test_writer_ids_are_validated(round_: Round, provenance: Provenance, writer_id: str) -> None:
    with pytest.raises(InvalidNameError):
        round_.writer(provenance, writer_id=writer_id)


@pytest.mark.parametrize("codec", ["gzip", None])
def test_an_unknown_codec_is_refused_before_rows_depend_on_it(
    round_: Round, provenance: Provenance, codec: object
) -> None:
    with pytest.raises(ValueError, match="zstd, lz4, none"):
        round_.writer(provenance, codec=codec)  # type: ignore[arg-type]


def test_provenance_of_another_round_is_refused(round_: Round) -> None:
    with pytest.raises(InvalidNameError):
        round_.writer(make_provenance(round_number=2))


def test_urls_and_other_filesystems(tmp_path: Path, provenance: Provenance) -> None:
    by_url = TrajectoryStore(f"file://{tmp_path}/store")
    write(by_url.round(1), provenance, ["a"])
    assert TrajectoryStore(tmp_path / "store").round(1).committed_ids() == {"a"}
    assert [r.number for r in by_url.rounds()] == [1]
    with pytest.raises(StoreError, match="nosuch"):
        TrajectoryStore("nosuch://x/y")


@pytest.mark.parametrize(
    ("url", "beneath"),
    [
        ("s3://bucket/store?region=eu-west-1&scheme=http", "s3://bucket/store/round-012?region=eu-west-1&scheme=http"),
        ("file:///srv/store/", "file:///srv/store/round-012"),
        ("runs/what?/store", "runs/what?/store/round-012"),
    ],
)
def test_a_round_is_named_as_the_command_line_takes_it(url: str, beneath: str) -> None:
    store = TrajectoryStore(url)
    assert store.url_of(12) == beneath
    named = named_round(beneath)
    assert named is not None and named.number == 12 and named.folder.path == store.round(12).folder.path


def test_a_remote_filesystem(provenance: Provenance) -> None:
    """pyarrow's in-memory file system takes the path of those that are neither local nor object stores."""
    store = TrajectoryStore("mock:///store")
    write(store.round(1), provenance, ["b", "a"])
    store.round(1).reject("c", "too long")
    store.round(1).seal(provenance)
    assert [t.prompt_id for t in store.round(1).reader()] == ["a", "b"]


def test_columns_can_be_read_alone(round_: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that count, only the columns asked for, and only their bytes fetched."""
    for part in ("abc", "cde"):
        with round_.writer(provenance, writer_id=part) as writer:
            for prompt_id in part:
                writer.append(make_trajectory(prompt_id, response_tokens=20_000))
    round_.seal(provenance)
    fetched = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal fetched
            content = super().read(size)
            fetched += len(content)
            return content

    def open_counting(folder: Folder, name: str) -> pa.PythonFile:
        return pa.PythonFile(Counting((Path(folder.path) / name).read_bytes()), "r")

    reader = round_.reader()
    monkeypatch.setattr(Folder, "open", open_counting)
    table = pa.Table.from_batches(reader.columns("prompt_id", "prompt"))
    assert table.schema.names == ["prompt_id", "prompt"]
    assert dict(zip(*table.to_pydict().values(), strict=True)) == {
        i: make_trajectory(i, response_tokens=20_000).prompt.tolist() for i in "abcde"
    }
    assert table.num_rows == 5
    assert fetched < round_.manifest.bytes / 10
    with pytest.raises(KeyError, match="novelty"):
        next(reader.columns("novelty"))


def test_memory_of_the_cache_is_bounded(round_: Round, provenance: Provenance) -> None:
    ids = [f"p{i:02d}" for i in range(30)]
    for prompt_id in ids:
        write(round_, provenance, [prompt_id])
    round_.seal(provenance)
    reader = round_.reader(cache_bytes=4000)
    expected = [make_trajectory(i) for i in ids]
    assert [reader[i] for i in reversed(range(30))] == expected[::-1]
    assert reader._layout._cached_bytes <= 4000
    assert pa.total_allocated_bytes() < 50_000_000
