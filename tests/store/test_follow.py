"""Follow mode: reading while others write, in an order that is recorded, until the round is sealed."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.store.conftest import make_trajectory
from trajectory_store import FollowPosition, FollowStep, Provenance, Round, RoundFollower, StoreError, Trajectory

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
        RoundFollower(round_, samples=4, position=FollowPosition("other", 3))
    with pytest.raises(StoreError, match="name"):
        RoundFollower(round_, samples=4, name="../x")
    with pytest.raises(ValueError, match="rank"):
        RoundFollower(round_, samples=4, rank=2, world_size=2)
