"""The log of steps is followed while it grows and starts over when the ranks do."""

from __future__ import annotations

from pathlib import Path

from jf_cluster.train.steps_log import StepRecord, StepsFollower, StepsLog, read_steps


def record(step: int) -> StepRecord:
    return StepRecord(step, 1.0 / step, 0.1, 0.2, 0.5, 1e-3, 1.0, 100, 0.9, 0.5, 0)


def test_records_are_followed_line_by_line_and_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    follower = StepsFollower(path)
    assert list(follower.new_records()) == []
    log = StepsLog(path, done=0)
    for step in (1, 2, 3):
        log.append(record(step))
    assert list(follower.new_records()) == [record(1), record(2), record(3)]
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed in the middle of a line
    assert list(follower.new_records()) == []
    again = StepsLog(path, done=2)
    again.append(record(3))
    assert list(follower.new_records()) == [record(1), record(2), record(3)]
    again.append(record(4))
    assert list(follower.new_records()) == [record(4)]
    assert read_steps(path) == [record(s) for s in (1, 2, 3, 4)]
