"""Rows numbered among all prompts: the same sealed and while they arrive."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.store.conftest import make_trajectory
from trajectory_store import (
    ArrivingRows,
    JoinedRows,
    Provenance,
    Round,
    SealedRows,
    StoreError,
    TrajectoryStore,
    WaitInterruptedError,
)
from trajectory_store.compact import compact_round
from trajectory_store.rows import digest_of, pause_s

IDS = [f"p{i:02d}é" for i in range(20)]
REJECTED = {IDS[0], IDS[7], IDS[8], IDS[19]}
ALL = np.arange(len(IDS))


def write(round_: Round, provenance: Provenance, ids: list[str], writer_id: str) -> None:
    with round_.writer(provenance, writer_id=writer_id) as writer:
        for prompt_id in ids:
            if prompt_id in REJECTED:
                round_.reject(prompt_id, "too long")
            else:
                writer.append(make_trajectory(prompt_id))


def test_sealed_rows_are_numbered_among_all_prompts(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS[::-1], "w")
    round_.seal(provenance)
    rows = SealedRows(round_)
    assert len(rows) == len(IDS)
    assert rows.present(ALL).tolist() == [prompt_id not in REJECTED for prompt_id in IDS]
    assert [rows[int(i)].prompt_id for i in ALL[rows.present(ALL)]] == [i for i in IDS if i not in REJECTED]
    assert rows.prompts_digest() == digest_of(IDS) != digest_of(IDS[1:])
    for i in ALL[~rows.present(ALL)].tolist():
        with pytest.raises(StoreError, match=f"'{IDS[i]}'.*given up on"):
            _ = rows[i]


def test_rounds_joined_are_one_after_the_other_each_row_with_its_own_origin(
    round_: Round, provenance: Provenance, tmp_path: Path
) -> None:
    write(round_, provenance, IDS[:12], "w")
    round_.seal(provenance)
    arriving = TrajectoryStore(str(tmp_path / "another")).round(2)
    later = replace(provenance, round_number=2, seed=provenance.seed + 1)
    joined = JoinedRows([SealedRows(round_), ArrivingRows(arriving, IDS[12:], poll_s=0.01)])
    assert len(joined) == 20
    collector = threading.Thread(target=write, args=(arriving, later, IDS[12:], "w"))
    collector.start()
    order = ALL[::-1]
    assert joined.present(order).tolist() == [IDS[i] not in REJECTED for i in order]
    collector.join()
    for i in ALL[joined.present(ALL)].tolist():
        assert joined[i].prompt_id == IDS[i]
        assert joined.provenance_of(i) == (provenance if i < 12 else later)
    assert joined.present(ALL[:0]).tolist() == []

    waiting = JoinedRows([SealedRows(round_), ArrivingRows(arriving, ["never"], poll_s=0.01)])
    waiting.give_up()
    with pytest.raises(WaitInterruptedError):
        waiting.present(np.array([3, 12]))


def test_arriving_rows_are_waited_for_and_are_those_of_the_sealed_round(round_: Round, provenance: Provenance) -> None:
    arriving = ArrivingRows(round_, IDS, poll_s=0.01)
    half_read = threading.Event()

    def collect() -> None:
        write(round_, provenance, IDS[10:], "w1")
        assert half_read.wait(30)
        write(round_, provenance, IDS[:10], "w2")

    collector = threading.Thread(target=collect)
    collector.start()
    late = arriving.present(ALL[12:])  # what is there is not waited for
    half_read.set()
    assert late.tolist() == [prompt_id not in REJECTED for prompt_id in IDS[12:]]
    present = arriving.present(ALL)
    collector.join()
    before = {int(i): arriving[int(i)].prompt_id for i in ALL[present]}
    round_.seal(provenance)
    compact_round(round_)
    sealed = SealedRows(round_)
    assert (sealed.present(ALL) == present).all() and arriving.provenance == provenance
    for i in ALL[present]:
        assert before[int(i)] == sealed[int(i)].prompt_id == arriving[int(i)].prompt_id
        assert np.array_equal(sealed[int(i)].tails, arriving[int(i)].tails)


def test_a_round_that_was_sealed_meanwhile_is_read_by_its_manifest(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS, "w")
    round_.seal(provenance)
    assert ArrivingRows(round_, reversed(IDS)).present(ALL).sum() == len(IDS) - len(REJECTED)


def test_other_prompts_than_announced_are_an_error(round_: Round, provenance: Provenance) -> None:
    write(round_, provenance, IDS, "w")
    arriving = ArrivingRows(round_, [*IDS, "one-more"])
    assert arriving.present(ALL + 1).any(), "the one more comes first"
    round_.seal(provenance)
    with pytest.raises(StoreError, match="sealed with 20 prompts, which are not the 21"):
        arriving.present(ALL)


def test_a_look_costs_what_is_new(round_: Round, provenance: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    write(round_, provenance, IDS[:10], "w1")
    arriving = ArrivingRows(round_, IDS)
    number, found = ArrivingRows._number, []

    def counted(self: ArrivingRows, prompt_id: str) -> int | None:
        found.append(prompt_id)
        return number(self, prompt_id)

    monkeypatch.setattr(ArrivingRows, "_number", counted)
    assert arriving._look() and sorted(found) == IDS[:10]
    found.clear()
    assert not arriving._look() and not found
    write(round_, provenance, IDS[10:], "w2")
    assert arriving._look() and sorted(found) == IDS[10:]
    assert arriving.present(ALL).tolist() == [prompt_id not in REJECTED for prompt_id in IDS]


def test_looks_become_rarer_while_nothing_comes() -> None:
    assert [pause_s(1.0, waited) for waited in (0, 9, 30, 1000)] == [1, 1, 3, 10]


def test_a_wait_can_be_given_up(tmp_path: Path, provenance: Provenance) -> None:
    round_ = TrajectoryStore(tmp_path).round(1)
    arriving = ArrivingRows(round_, IDS, poll_s=60)
    threading.Timer(0.1, arriving.give_up).start()
    with pytest.raises(WaitInterruptedError):
        arriving.present(ALL)
