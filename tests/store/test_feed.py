"""Feeds: the same steps for every world size and thread count, exact resume, balanced ranks, errors in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.store.conftest import make_trajectory, wait_until_read
from trajectory_store import (
    CorruptShardError,
    FeedStep,
    Position,
    Provenance,
    Round,
    StoreError,
    Trajectory,
    TrajectoryFeed,
    TrajectoryReader,
    balanced_shares,
    step_bounds,
)

ROWS = 101


@pytest.fixture
def reader(round_: Round, provenance: Provenance) -> TrajectoryReader:
    for part in range(4):
        with round_.writer(provenance, writer_id=f"w{part}") as writer:
            for i in range(part, ROWS, 4):
                writer.append(make_trajectory(f"p{i:03d}"))
    round_.seal(provenance)
    return round_.reader()


def run(reader: TrajectoryReader, world_size: int, **options: object) -> list[list[FeedStep]]:
    """The steps of every rank, [step][rank]."""
    by_rank = []
    for rank in range(world_size):
        arguments = {"seed": 5, "samples": 12} | options
        with TrajectoryFeed(reader, rank=rank, world_size=world_size, **arguments) as feed:  # type: ignore[arg-type]
            by_rank.append(list(feed))
    assert len({len(steps) for steps in by_rank}) == 1
    return [list(step) for step in zip(*by_rank, strict=True)]


def step_rows(steps: list[list[FeedStep]]) -> list[list[int]]:
    """The rows of each step, all ranks together."""
    return [sorted(row for part in step for row in part.rows.tolist()) for step in steps]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"samples": None, "tokens": 500}, {"samples": 9, "tokens": 300}])
def test_steps_do_not_depend_on_the_world_size(
    reader: TrajectoryReader, world_size: int, options: dict[str, object]
) -> None:
    alone = run(reader, 1, epochs=2, **options)
    shared = run(reader, world_size, epochs=2, **options)
    assert step_rows(shared) == step_rows(alone)
    assert [step[0].position for step in shared] == [step[0].position for step in alone]
    rows = [row for step in step_rows(alone) for row in step]
    assert sorted(rows[:ROWS]) == sorted(rows[ROWS:]) == list(range(ROWS))
    assert rows[:ROWS] != rows[ROWS:]


def test_every_row_is_the_row_it_says(reader: TrajectoryReader) -> None:
    for step in run(reader, 2):
        for part in step:
            assert [reader[row] for row in part.rows.tolist()] == list(part.trajectories)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_and_prefetch_change_nothing(reader: TrajectoryReader, threads: int) -> None:
    expected = [step[0].rows.tolist() for step in run(reader, 1)]
    got = run(reader, 1, threads=threads, prefetch_steps=7)
    assert [step[0].rows.tolist() for step in got] == expected


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (8, 1), (3, 8)])
@pytest.mark.parametrize("stop_after", [1, 4, 9, 13])
def test_resume_continues_the_very_sequence(reader: TrajectoryReader, before: int, after: int, stop_after: int) -> None:
    """Also within an epoch, over an epoch's end, and onto another world size."""
    whole = step_rows(run(reader, 1, epochs=2))
    first = run(reader, before, epochs=2)[:stop_after]
    saved = json.loads(json.dumps(first[-1][-1].position.to_dict()))
    rest = run(reader, after, epochs=2, position=Position.from_dict(saved))
    assert step_rows(first) + step_rows(rest) == whole
    # Not only the same steps: every rank reads the very sequence it would have read without the interruption.
    for world_size, part, places in ((before, first, slice(stop_after)), (after, rest, slice(stop_after, None))):
        uninterrupted = run(reader, world_size, epochs=2)[places]
        assert [[p.rows.tolist() for p in s] for s in part] == [[p.rows.tolist() for p in s] for s in uninterrupted]


def test_the_order_within_a_rank_is_the_global_one(reader: TrajectoryReader) -> None:
    whole = [row for step in run(reader, 1) for row in step[0].rows.tolist()]
    for rank in range(3):
        mine = [row for step in run(reader, 3) for row in step[rank].rows.tolist()]
        places = [whole.index(row) for row in mine]
        assert places == sorted(places)


def test_drop_last(reader: TrajectoryReader) -> None:
    assert len(run(reader, 1)) == 9
    assert len(run(reader, 1, drop_last=True)) == 8
    assert len(run(reader, 1, drop_last=True, epochs=2)) == 16
    assert run(reader, 1, drop_last=True, samples=ROWS + 1, epochs=None) == []


def test_a_position_of_other_data_is_refused(reader: TrajectoryReader) -> None:
    position = run(reader, 1)[0][0].position
    with pytest.raises(StoreError, match="seed"):
        TrajectoryFeed(reader, seed=6, samples=1, position=position)
    with pytest.raises(StoreError, match="round"):
        TrajectoryFeed(reader, seed=5, samples=1, position=Position("other", 5, 0, 0))


def test_ranks_get_near_equal_tokens() -> None:
    rng = np.random.default_rng(0)
    for world_size in (2, 3, 4, 8):
        lengths = rng.integers(20, 2000, 16 * world_size)
        loads = [int(lengths[share].sum()) for share in balanced_shares(lengths, world_size)]
        assert max(loads) <= 1.05 * min(loads)
        few = balanced_shares(np.array([1000] + [1] * (world_size - 1)), world_size)
        assert [len(share) for share in few] == [1] * world_size


def test_steps_end_by_rows_and_by_tokens() -> None:
    lengths = np.array([5, 5, 50, 1, 1, 1, 1])
    assert list(step_bounds(lengths, samples=3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(step_bounds(lengths, tokens=10)) == [(0, 2), (2, 3), (3, 7)]
    assert list(step_bounds(lengths, samples=2, tokens=10)) == [(0, 2), (2, 3), (3, 5), (5, 7)]
    with pytest.raises(ValueError, match="samples"):
        list(step_bounds(lengths))


def test_an_empty_round_feeds_nothing(round_: Round, provenance: Provenance) -> None:
    round_.seal(provenance)
    assert list(TrajectoryFeed(round_.reader(), seed=0, samples=4, epochs=None)) == []


def test_a_bad_shard_stops_the_feed_where_it_is_met(round_: Round, reader: TrajectoryReader) -> None:
    name = round_.manifest.shards[2].name
    path = Path(round_.folder.path) / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptShardError, match=name), TrajectoryFeed(round_.reader(), seed=0, samples=4) as feed:
        list(feed)


def test_reading_ahead_hides_the_reading(reader: TrajectoryReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the trainer is busy with one step, just the next two are read."""
    original = TrajectoryReader.__getitem__
    read: list[int] = []

    def row(self: TrajectoryReader, i: int) -> Trajectory:
        read.append(i)
        return original(self, i)

    monkeypatch.setattr(TrajectoryReader, "__getitem__", row)
    with TrajectoryFeed(reader, seed=0, samples=10, prefetch_steps=2) as feed:
        for number, step in zip(range(1, 6), feed, strict=False):
            wait_until_read(read, 10 * (number + 2))
            assert len(read) == 10 * (number + 2)
            assert read[10 * (number - 1) : 10 * number] == step.rows.tolist()


def test_an_iteration_that_was_broken_off_keeps_no_steps(reader: TrajectoryReader) -> None:
    feed = TrajectoryFeed(reader, seed=5, samples=12)
    for _ in range(3):
        for _ in feed:
            break
    assert feed._runs == []


@pytest.mark.parametrize(
    "begin",
    [
        "round_.seal(provenance); steps = iter(TrajectoryFeed(round_.reader(), seed=0, samples=1))",
        "steps = iter(RoundFollower(round_, samples=1, poll_s=0.01)); time.sleep(0.1)",
    ],
    ids=["feed", "follower"],
)
def test_a_process_that_fails_while_steps_are_read_ahead_ends(tmp_path: Path, begin: str) -> None:
    script = f"""
import time
from tests.store.conftest import make_provenance, make_trajectory
from trajectory_store import RoundFollower, TrajectoryFeed, TrajectoryStore
round_, provenance = TrajectoryStore({str(tmp_path)!r}).round(1), make_provenance()
with round_.writer(provenance) as writer:
    for i in range(9):
        writer.append(make_trajectory(f"p{{i}}"))
{begin}
next(steps)
raise RuntimeError("training failed")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "training failed" in ended.stderr
