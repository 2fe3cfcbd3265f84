"""Sealing while others seal and write, on a disk and on S3: one manifest, and every acknowledged commit is in it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import Manifest, Provenance, Round, RoundSealedError, StoreUnavailableError
from trajectory_store import store as store_module
from trajectory_store.conditional import S3Access
from trajectory_store.folder import Folder
from trajectory_store.state import MANIFEST_NAME, announce_seal
from trajectory_store.verify import verify_round


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest) -> Round:
    found: Round = request.getfixturevalue("round_" if request.param == "disk" else "s3")
    return found


def write(round_: Round, ids: list[str], **options: object) -> None:
    with round_.writer(make_provenance(), **options) as writer:  # type: ignore[arg-type]
        for prompt_id in ids:
            writer.append(make_trajectory(prompt_id))


def at_once(count: int, work: object) -> list[object]:
    """What `work(i)` gives in `count` threads that start together."""
    barrier = threading.Barrier(count)

    def run(i: int) -> object:
        barrier.wait()
        return work(i)  # type: ignore[operator]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_of_simultaneous_creators_one_wins(place: Round) -> None:
    folder = place.folder
    for name in "abcd":
        contents = [f"{name}{i}".encode() for i in range(6)]
        won = at_once(6, lambda i, name=name, contents=contents: folder.create(name, contents[i]))
        assert won.count(True) == 1
        assert bytes(folder.read(name)) == contents[won.index(True)]


def test_of_simultaneous_replacements_one_wins(place: Round) -> None:
    folder = place.folder
    assert not folder.replace("x", b"", b"never there")
    before = b"0"
    folder.publish("x", before)
    for turn in range(4):
        contents = [f"{turn}.{i}".encode() for i in range(6)]
        won = at_once(6, lambda i, before=before, contents=contents: folder.replace("x", before, contents[i]))
        assert won.count(True) == 1
        assert not folder.replace("x", before, b"late")
        before = contents[won.index(True)]
        assert bytes(folder.read("x")) == before


def test_simultaneous_seals_agree(place: Round, provenance: Provenance) -> None:
    write(place, ["a", "b"])
    manifests = at_once(5, lambda i: place.seal(provenance))
    assert manifests == [place.manifest] * 5
    assert [t.prompt_id for t in place.reader()] == ["a", "b"]
    assert list(verify_round(place)) == []


def test_a_commit_during_a_seal_is_in_it(place: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard appears after the sealer has listed shards and before it publishes the manifest."""
    write(place, ["a"])
    original = store_module.build_manifest
    listed = 0

    def build(*arguments: object, **options: object) -> object:
        nonlocal listed
        built = original(*arguments, **options)  # type: ignore[arg-type]
        listed += 1
        if listed == 1:
            assert place.stage == "sealing"
            write(place, ["b"])
            assert place.stage == "open"
        return built

    monkeypatch.setattr(store_module, "build_manifest", build)
    assert place.seal(provenance).rows == 2
    assert listed == 2
    assert list(verify_round(place)) == []


@pytest.mark.parametrize("late", [True, False], ids=["before the record", "after it"])
def test_a_reject_during_a_seal_is_in_it_or_refused(
    place: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    place.reject("a", "too long")
    create = Folder.create

    def seal_meanwhile(folder: Folder, name: str, content: object) -> bool:
        monkeypatch.setattr(Folder, "create", create)
        if late:
            place.seal(provenance)
        created = create(folder, name, content)
        if not late:
            place.seal(provenance)
        return created

    monkeypatch.setattr(Folder, "create", seal_meanwhile)
    with pytest.raises(RoundSealedError, match="while 'b' was") if late else nullcontext():
        place.reject("b", "too long")
    assert place.rejects().keys() == ({"a"} if late else {"a", "b"})
    assert list(verify_round(place)) == []


def test_a_shard_taken_back_during_a_seal_is_not_in_it(
    place: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that finds the round sealed deletes its late shard, which a second sealer may have listed by then."""
    write(place, ["a"])
    [kept] = place.shard_names()
    write(place, ["b"])
    original = store_module.build_manifest
    tried = 0

    def build(*arguments: object, **options: object) -> object:
        nonlocal tried
        tried += 1
        for name in set(place.shard_names()) - {kept}:
            place.folder.delete(name)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "build_manifest", build)
    assert place.seal(provenance).rows == 1
    assert tried == 2
    assert list(verify_round(place)) == []


def test_a_shard_taken_back_is_not_committed(place: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its late writer deletes it after it was listed, before it is read."""
    write(place, ["a"])
    [kept] = place.shard_names()
    write(place, ["b"])
    original, listings = Round.shard_names, 0

    def shard_names(self: Round) -> list[str]:
        nonlocal listings
        names = original(self)
        listings += 1
        for name in set(names) - {kept}:
            self.folder.delete(name)
        return names

    monkeypatch.setattr(Round, "shard_names", shard_names)
    assert set(place.committed_ids()) == {"a"}
    assert listings == 2


def test_seals_and_commits_at_once(place: Round, provenance: Provenance) -> None:
    """Two sealers and four writers at once: one manifest, and it names exactly what writers were told is committed."""

    def work(i: int) -> Manifest | set[str]:
        if i < 2:
            return round_.seal(provenance)
        committed: set[str] = set()
        try:
            for number in range(4):
                write(round_, [f"p{i}-{number}"], writer_id=f"w{i}_{number}")
                committed.add(f"p{i}-{number}")
        except RoundSealedError:
            pass
        return committed

    store = store_module.TrajectoryStore(place.folder.path)
    for turn in range(1, 3):
        round_ = Round(place.folder.child(f"turn-{turn}"), 1)
        results = at_once(6, work)
        assert results[0] == results[1] == round_.manifest
        told = set().union(*results[2:])  # type: ignore[arg-type]
        assert {t.prompt_id for t in round_.reader()} == told
        assert [f for f in verify_round(round_) if f.severity == "bad"] == []
    assert store.rounds() == []


def test_a_seal_of_a_dead_process_is_taken_over(place: Round, provenance: Provenance) -> None:
    write(place, ["a"])
    assert announce_seal(place.folder) is not None
    assert place.stage == "sealing"
    assert not place.is_sealed
    assert list(verify_round(place)) == []
    write(place, ["b"])  # a restarted run goes on writing
    assert announce_seal(place.folder) is not None
    assert place.seal(provenance).rows == 2


def test_s3_without_boto3_says_what_to_install(s3: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(StoreUnavailableError, match=r"pip install 'jf-cluster\[s3\]'"):
        s3.writer(make_provenance())


def test_where_a_url_leads() -> None:
    assert S3Access.of("s3://bucket/x", "eu-west-1") == S3Access("eu-west-1", None, None, None)
    url = "s3://key:se%2Fcret@bucket/x?endpoint_override=127.0.0.1:9000&scheme=http"
    assert S3Access.of(url, "r") == S3Access("r", "http://127.0.0.1:9000", "key", "se/cret")
    assert S3Access.of("s3://b?endpoint_override=https%3A%2F%2Fhere", "r").endpoint_url == "https://here"


def test_a_network_disk_without_links_or_locks_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provenance: Provenance
) -> None:
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    folder = Folder.at(tmp_path)
    assert folder.create("x", b"1")
    assert not folder.create("x", b"2")
    assert not folder.replace("x", b"2", b"3")
    assert folder.replace("x", b"1", b"2")
    assert bytes(folder.read("x")) == b"2"
    round_ = store_module.TrajectoryStore(tmp_path).round(1)
    write(round_, ["a"])
    assert round_.seal(provenance).rows == 1
    assert MANIFEST_NAME in round_.folder.entries()
