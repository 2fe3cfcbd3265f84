"""Writers and readers under any sequence of operations, against a dictionary that does the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from tests.store.conftest import make_provenance, make_trajectory, memory_folder
from trajectory_store import (
    Position,
    Round,
    RoundNotSealedError,
    RoundSealedError,
    Trajectory,
    TrajectoryFeed,
    TrajectoryStore,
    TrajectoryWriter,
)
from trajectory_store.trajectory import digest
from trajectory_store.verify import verify_round

IDS = st.sampled_from([f"p{i}" for i in range(12)])
SEEDS = st.integers(0, 2)
SETTINGS = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class WritingMachine(RuleBasedStateMachine):
    """Any number of writers open, append, commit, crash, fail; rounds are sealed and read at any time."""

    writers = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = memory_folder()
        self.round = TrajectoryStore(self.folder).round(1)
        self.published: dict[str, list[Trajectory]] = {}
        self.buffered: dict[int, dict[str, Trajectory]] = {}
        self.rejected: dict[str, str] = {}
        self.sealed = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(target=writers, codec=st.sampled_from(["zstd", "lz4", "none"]))
    def open_writer(self, codec: str) -> object:
        if self.sealed:
            with pytest.raises(RoundSealedError):
                self.round.writer(make_provenance())
            return multiple()
        writer = self.round.writer(make_provenance(), codec=codec)  # type: ignore[arg-type]
        self.buffered[id(writer)] = {}
        return writer

    @rule(writer=writers, prompt_id=IDS, seed=SEEDS)
    def append(self, writer: TrajectoryWriter, prompt_id: str, seed: int) -> None:
        trajectory = make_trajectory(prompt_id, seed)
        writer.append(trajectory)
        self.buffered[id(writer)].setdefault(prompt_id, trajectory)

    @rule(writer=writers)
    def commit(self, writer: TrajectoryWriter) -> None:
        rows = self.buffered[id(writer)]
        if self.sealed and rows:
            with pytest.raises(RoundSealedError):
                writer.commit()
            return
        writer.commit()
        for prompt_id, trajectory in rows.items():
            self.published.setdefault(prompt_id, []).append(trajectory)
        self.buffered[id(writer)] = {}

    @rule(writer=consumes(writers))
    def fail(self, writer: TrajectoryWriter) -> None:
        with pytest.raises(RuntimeError), writer:
            raise RuntimeError
        del self.buffered[id(writer)]

    @rule(writer=consumes(writers))
    def crash(self, writer: TrajectoryWriter) -> None:
        """The process is gone: nobody ever closes this writer."""
        del self.buffered[id(writer)]

    @rule(prompt_id=IDS, reason=st.text(max_size=5))
    def reject(self, prompt_id: str, reason: str) -> None:
        if self.sealed:
            with pytest.raises(RoundSealedError):
                self.round.reject(prompt_id, reason)
        else:
            self.round.reject(prompt_id, reason)
            self.rejected.setdefault(prompt_id, reason)

    @rule()
    def seal(self) -> None:
        manifest = self.round.seal(make_provenance())
        self.sealed = True
        assert manifest.rows == len(self.published)
        assert manifest.rejects == len(self.rejected.keys() - self.published.keys())

    @invariant()
    def what_was_committed_is_there(self) -> None:
        assert self.round.committed_ids() == set(self.published)
        assert self.round.rejects() == self.rejected

    @invariant()
    def a_sealed_round_reads_as_it_was_written(self) -> None:
        if not self.sealed:
            with pytest.raises(RoundNotSealedError):
                self.round.reader()
            return
        expected = [min(self.published[i], key=digest) for i in sorted(self.published)]
        assert list(self.round.reader()) == expected

    @precondition(lambda self: bool(self.published) or self.sealed)
    @invariant()
    def nothing_is_wrong_with_it(self) -> None:
        assert list(verify_round(self.round)) == []


class ReadingMachine(RuleBasedStateMachine):
    """Random access through a cache that holds almost nothing, and feeds stopped and resumed anywhere."""

    @initialize(rows=st.integers(1, 40), shards=st.integers(1, 6))
    def fill(self, rows: int, shards: int) -> None:
        self.folder = memory_folder()
        round_ = TrajectoryStore(self.folder).round(1)
        for shard in range(shards):
            with round_.writer(make_provenance(), writer_id=f"w{shard}") as writer:
                for i in range(shard, rows, shards):
                    writer.append(make_trajectory(f"p{i:02d}"))
        round_.seal(make_provenance())
        self.round: Round = round_
        self.rows = [make_trajectory(f"p{i:02d}") for i in range(rows)]
        self.reader = round_.reader(cache_bytes=2000)
        self.position: Position | None = None
        self.seen: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @rule(i=st.integers(-60, 60))
    def get(self, i: int) -> None:
        if -len(self.rows) <= i < len(self.rows):
            assert self.reader[i] == self.rows[i]
        else:
            with pytest.raises(IndexError):
                _ = self.reader[i]

    @rule(i=st.integers(0, 60))
    def find(self, i: int) -> None:
        found = self.reader.find(f"p{i:02d}")
        assert found == (self.rows[i] if i < len(self.rows) else None)

    @rule(verify=st.booleans(), cache_bytes=st.sampled_from([0, 500, 1 << 20]))
    def reopen(self, verify: bool, cache_bytes: int) -> None:
        self.reader = self.round.reader(verify=verify, cache_bytes=cache_bytes)

    @rule(
        world_size=st.integers(1, 5),
        samples=st.integers(1, 9),
        steps=st.integers(1, 6),
        threads=st.integers(1, 3),
        prefetch=st.integers(1, 4),
    )
    def train_for_a_while(self, world_size: int, samples: int, steps: int, threads: int, prefetch: int) -> None:
        feeds = [
            TrajectoryFeed(
                self.reader,
                seed=3,
                samples=samples,
                rank=rank,
                world_size=world_size,
                epochs=None,
                position=self.position,
                threads=threads,
                prefetch_steps=prefetch,
            )
            for rank in range(world_size)
        ]
        for number, parts in enumerate(zip(*feeds, strict=True)):
            if number == steps:
                break
            assert len({part.position for part in parts}) == 1
            self.position = parts[0].position
            self.seen.append(sum(len(part.rows) for part in parts))
            for part in parts:
                assert [self.rows[row] for row in part.rows.tolist()] == list(part.trajectories)
        for feed in feeds:
            feed.close()

    @invariant()
    def every_row_is_seen_once_an_epoch(self) -> None:
        if getattr(self, "position", None) is not None:
            assert self.position is not None
            assert sum(self.seen) == self.position.epoch * len(self.rows) + self.position.consumed


TestWriting = WritingMachine.TestCase
TestWriting.settings = SETTINGS
TestReading = ReadingMachine.TestCase
TestReading.settings = SETTINGS


def test_the_machines_write_to_a_real_folder() -> None:
    """Guards against a machine that never gets anywhere: its first steps leave files."""
    machine = WritingMachine()
    writer = machine.open_writer("zstd")
    assert isinstance(writer, TrajectoryWriter)
    writer.append(make_trajectory("p0"))
    writer.commit()
    assert list(Path(machine.folder).glob("round-001/shard-*"))
    machine.teardown()
