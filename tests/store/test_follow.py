"""Follow mode: reading while others write, in an order that is recorded, until the round is sealed."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests.store.conftest import make_trajectory, wait_until_read
from trajectory_store import (
    CorruptShardError,
    FollowPosition,
    FollowStep,
    Provenance,
    Round,
    RoundFollower,
    StoreError,
    Trajectory,
)
from trajectory_store.commit_order import Place
from trajectory_store.compact import compact_round

IDS = [f"p{i:02d}" for i in range(40)]


def write(round_: Round, provenance: Provenance, ids: list[str], writer_id: str) -> None:
    with round_.writer(provenance, writer_id=writer_id) as writer:
        for number, prompt_id in enumerate(ids):
            writer.append(make_trajectory(prompt_id))
            if number % 3 == 2:
                writer.commit()
                time.sleep(0.01)


def ids(steps: list[FollowStep]) -> list[str]:
    return [trajectory.prompt_id for step in steps for trajectory in step.trajectories]


def test_a_trainer_reads_while_two_collectors_write(round_: Round, provenance: Provenance) -> None:
    def collect() -> None:
        with ThreadPoolExecutor(2) as pool:
            # Both write some of the same prompts.
            list(pool.map(lambda i: write(round_, provenance, IDS[15 * i : 15 * i + 25], f"w{i}"), range(2)))
        round_.seal(provenance)

    collector = threading.Thread(target=collect)
    collector.start()
    steps, early = [], 0
    for step in RoundFollower(round_, samples=4, poll_s=0.005, timeout_s=30):
        early += not round_.is_sealed
        steps.append(step)
    collector.join()
    assert early > 0
    assert sorted(ids(steps)) == IDS
    rows: list[Trajectory] = [trajectory for step in steps for trajectory in step.trajectories]
    assert all(row == make_trajectory(row.prompt_id) for row in rows)
    assert [len(step.trajectories) for step in steps] == [4] * 10
    # The record repeats the very sequence, and so does a resume from any point, on any world size.
    again = list(RoundFollower(round_, samples=4, poll_s=0.005))
    assert ids(again) == ids(steps)
    for stop in (1, 5, 9):
        saved = FollowPosition.from_dict(json.loads(json.dumps(steps[stop - 1].position.to_dict())))
        assert ids(list(RoundFollower(round_, samples=4, position=saved))) == ids(steps[stop:])
        parts = [list(RoundFollower(round_, samples=4, position=saved, rank=r, world_size=3)) for r in range(3)]
        shared = [sorted(ids([p[i] for p in parts])) for i in range(len(parts[0]))]
        assert shared == [sorted(ids([step])) for step in steps[stop:]]


def test_other_ranks_wait_for_the_record(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS[:12], "w")
    with pytest.raises(StoreError, match="nothing new"):
        list(RoundFollower(round_, samples=4, rank=1, world_size=2, poll_s=0.005, timeout_s=0.05))
    with ThreadPoolExecutor(2) as pool:
        ranks = [RoundFollower(round_, samples=4, rank=r, world_size=2, poll_s=0.005, timeout_s=30) for r in (1, 0)]
        futures = [pool.submit(list, follower) for follower in ranks]
        time.sleep(0.05)
        write(round_, provenance, IDS[12:16], "late")
        round_.seal(provenance)
        parts = [future.result() for future in futures]
    assert sorted(ids(parts[0]) + ids(parts[1])) == IDS[:16]
    assert [step.position for step in parts[0]] == [step.position for step in parts[1]]


def test_an_empty_round_ends_at_once(round_: Round, provenance: Provenance) -> None:
    round_.seal(provenance)
    assert list(RoundFollower(round_, samples=4)) == []


def test_what_does_not_fit_is_refused(round_: Round) -> None:
    with pytest.raises(StoreError, match="order"):
        RoundFollower(round_, samples=4, position=FollowPosition("other", 3, "p02"))
    with pytest.raises(StoreError, match="name"):
        RoundFollower(round_, samples=4, name="../x")
    with pytest.raises(ValueError, match="rank"):
        RoundFollower(round_, samples=4, rank=2, world_size=2)


@pytest.mark.parametrize("compact_after", [0, 1, 6])
def test_compaction_under_a_follower(round_: Round, provenance: Provenance, compact_after: int) -> None:
    """It goes on with the same rows, and the record stays good: resumed afterwards it repeats the same order."""
    write(round_, provenance, IDS[:20][::-1], "b")
    with RoundFollower(round_, samples=3, poll_s=0.005, timeout_s=30) as follower:
        steps, following = [], iter(follower)
        for _ in range(compact_after):
            steps.append(next(following))
        write(round_, provenance, IDS[10:], "a")
        before = round_.seal(provenance)
        after = compact_round(round_, shard_bytes=3000)
        assert not {s.name for s in before.shards} & {s.name for s in after.shards}
        steps += following
    assert sorted(ids(steps)) == IDS
    assert [t for step in steps for t in step.trajectories] == [make_trajectory(i) for i in ids(steps)]
    compact_round(round_)
    for stop in (1, 7, 12):
        for world_size in (1, 2, 3):
            parts = [
                list(RoundFollower(round_, samples=3, position=steps[stop - 1].position, rank=r, world_size=world_size))
                for r in range(world_size)
            ]
            shared = [[i for part in parts for i in ids([part[n]])] for n in range(len(parts[0]))]
            expected = [ids([step]) for step in steps[stop:]]
            if world_size > 1:
                shared, expected = ([sorted(step) for step in side] for side in (shared, expected))
            assert shared == expected


def test_what_is_written_is_handed_out_while_more_is_awaited(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS[:9], "w")
    with RoundFollower(round_, samples=4, poll_s=60, prefetch_steps=8) as follower:
        began = time.monotonic()
        steps = list(islice(follower, 2))
        assert time.monotonic() - began < 30
    assert ids(steps) == IDS[:8]


def test_reading_ahead_hides_the_reading(
    round_: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the trainer is busy with one step, just the next two are read."""
    with round_.writer(provenance) as writer:
        for prompt_id in IDS:
            writer.append(make_trajectory(prompt_id))
    original = RoundFollower._row
    read: list[str] = []

    def row(self: RoundFollower, place: Place) -> Trajectory:
        read.append(place.prompt_id)
        return original(self, place)

    monkeypatch.setattr(RoundFollower, "_row", row)
    with RoundFollower(round_, samples=4, poll_s=0.005, prefetch_steps=2) as follower:
        following = iter(follower)
        for step in range(1, 5):
            assert ids([next(following)]) == IDS[4 * (step - 1) : 4 * step]
            wait_until_read(read, 4 * (step + 2))
            assert read == IDS[: 4 * (step + 2)]


def test_a_position_of_another_record_is_refused(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS[:8], "w")
    round_.seal(provenance)
    list(RoundFollower(round_, samples=4))
    for position in (FollowPosition("trainer", 4, "x"), FollowPosition("trainer", 9, "p07")):
        with pytest.raises(StoreError, match="another one"):
            list(RoundFollower(round_, samples=4, position=position))


def test_a_damaged_record_is_named(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS[:8], "w")
    round_.seal(provenance)
    list(RoundFollower(round_, samples=4))
    entry = Path(round_.folder.path) / "order-trainer" / "000000.arrow"
    whole = entry.read_bytes()
    for damaged in (whole[:-9], whole[:50], b"", whole.replace(b"tokens", b"t0kens")):
        entry.write_bytes(damaged)
        with pytest.raises(CorruptShardError, match=r"000000\.arrow"):
            list(RoundFollower(round_, samples=4))


def test_a_round_on_s3_is_followed(s3: Round, provenance: Provenance) -> None:
    write(s3, provenance, IDS[:6], "w")
    with RoundFollower(s3, samples=4, poll_s=0.01, timeout_s=60) as follower:
        following = iter(follower)
        steps = [next(following)]
        write(s3, provenance, IDS[6:10], "late")
        s3.seal(provenance)
        steps += following
    assert sorted(ids(steps)) == IDS[:10]
    assert ids(list(RoundFollower(s3, samples=4))) == ids(steps)
