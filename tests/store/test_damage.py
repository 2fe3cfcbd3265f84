"""Damaged, missing and foreign files: named by readers, by `verify`, and never taken for data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.store.conftest import make_trajectory
from trajectory_store import CorruptShardError, MissingShardError, Provenance, Round, StoreUnavailableError
from trajectory_store.verify import verify_round


@pytest.fixture
def sealed(round_: Round, provenance: Provenance) -> Round:
    for part in range(3):
        with round_.writer(provenance, writer_id=f"w{part}") as writer:
            for i in range(20):
                writer.append(make_trajectory(f"p{part}-{i}", response_tokens=100))
    round_.seal(provenance)
    return round_


def path_of(round_: Round, name: str) -> Path:
    return Path(round_.folder.path) / name


def read_all(round_: Round) -> None:
    for _ in round_.reader():
        pass


def bad_names(round_: Round) -> list[str]:
    return [finding.name for finding in verify_round(round_) if finding.severity == "bad"]


def test_an_intact_round_verifies(sealed: Round) -> None:
    assert list(verify_round(sealed)) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_one_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"hello" * 100)


@pytest.mark.parametrize("damage", [truncate, cut_one_byte, empty, garbage, Path.unlink])
@pytest.mark.parametrize("kind", ["shard", "index"])
def test_a_damaged_file_is_named(sealed: Round, damage: Callable[[Path], None], kind: str) -> None:
    name = sealed.manifest.index if kind == "index" else sealed.manifest.shards[1].name
    damage(path_of(sealed, name))
    with pytest.raises(MissingShardError if damage is Path.unlink else CorruptShardError, match=name):
        read_all(sealed)
    assert bad_names(sealed) == [name]


def test_any_flipped_bit_is_noticed(sealed: Round) -> None:
    """At positions all over the file: readers raise or return exactly what was written; `verify` always notices."""
    name = sealed.manifest.shards[0].name
    path = path_of(sealed, name)
    original, expected = path.read_bytes(), list(sealed.reader())
    rng = np.random.default_rng(0)
    unnoticed = 0
    for position in rng.integers(0, len(original), 120).tolist():
        flipped = bytearray(original)
        flipped[position] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(flipped)
        assert bad_names(sealed) == [name]
        try:
            assert list(sealed.reader()) == expected
            unnoticed += 1  # padding, or metadata that does not matter
        except CorruptShardError as error:
            assert name in str(error)
    assert unnoticed < 60


def test_a_shard_in_the_place_of_another_is_noticed(sealed: Round) -> None:
    first, second = (path_of(sealed, shard.name) for shard in sealed.manifest.shards[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptShardError, match=first.name):
        read_all(sealed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"readable_by": 1}'])
def test_a_damaged_manifest_is_named(sealed: Round, content: bytes) -> None:
    path_of(sealed, "manifest.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"manifest\.json"):
        sealed.reader()
    assert bad_names(sealed) == ["manifest.json"]


@pytest.mark.parametrize("name", ["../else/shard.arrow", "/etc/passwd", "index-0.arrow/../x.arrow", "", 7])
@pytest.mark.parametrize("kind", ["shard", "index"])
def test_a_manifest_names_no_file_elsewhere(sealed: Round, kind: str, name: object) -> None:
    path = path_of(sealed, "manifest.json")
    content = json.loads(path.read_text())
    if kind == "index":
        content["index"] = name
    else:
        content["shards"][1]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptShardError, match=r"manifest\.json is not a readable manifest"):
        sealed.reader()
    assert bad_names(sealed) == ["manifest.json"]


@pytest.mark.parametrize(
    "change",
    [{"content_hash": "0" * 64}, {"response_tokens": 5}, {"iterations": 1}, {"blocks": 1}, {"rejects": 1}],
    ids=str,
)
def test_a_manifest_that_says_something_else_of_the_round_is_noticed(sealed: Round, change: dict[str, object]) -> None:
    manifest = Path(sealed.folder.path_of("manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    [finding] = verify_round(sealed)
    assert (finding.severity, finding.name) == ("bad", "manifest.json")
    assert next(iter(change)) in finding.what


def test_a_manifest_that_says_something_else_of_a_shard_is_noticed(sealed: Round) -> None:
    manifest = Path(sealed.folder.path_of("manifest.json"))
    checksum = sealed.manifest.shards[0].checksum
    manifest.write_text(manifest.read_text().replace(f'"checksum": "{checksum}"', '"checksum": "0"'))
    assert [(finding.name, finding.what) for finding in verify_round(sealed)] == [
        ("manifest.json", "what it says of shards is not so")
    ]


def test_foreign_and_leftover_files_are_no_data(round_: Round, provenance: Provenance) -> None:
    with round_.writer(provenance) as writer:
        writer.append(make_trajectory("a"))
    folder = Path(round_.folder.path)
    shard = (folder / round_.shard_names()[0]).read_bytes()
    (folder / "notes.txt").write_text("mine")
    (folder / ".tmp-otherhost-1-abcd-shard-x.arrow").write_bytes(shard[:100])
    (folder / "shard-x-000000-zz.arrow").write_bytes(b"junk")
    assert round_.committed_ids() == {"a"}
    assert bad_names(round_) == []
    assert len(list(verify_round(round_))) == 3
    assert round_.seal(provenance).rows == 1


def test_a_corrupt_shard_stops_sealing_until_it_is_deleted(round_: Round, provenance: Provenance) -> None:
    for prompt_id in "ab":
        with round_.writer(provenance, writer_id=prompt_id) as writer:
            writer.append(make_trajectory(prompt_id, response_tokens=50))
    name = round_.shard_names()[0]
    path = path_of(round_, name)
    path.write_bytes(path.read_bytes()[:-20])
    fresh = Round(round_.folder, 1)
    for attempt in (fresh.committed_ids, lambda: fresh.seal(provenance)):
        with pytest.raises(CorruptShardError, match=name):
            attempt()
    path.unlink()
    assert fresh.committed_ids() == {"b"}
    assert fresh.seal(provenance).rows == 1


def test_an_unwritable_place_is_reported(tmp_path: Path, round_: Round, provenance: Provenance) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(StoreUnavailableError, match="store"):
        round_.writer(provenance)
