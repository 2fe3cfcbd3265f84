"""Export and import: nothing is lost on the way out and back, and the published formats are understood."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.store.conftest import BLOCK_SIZE, make_provenance, make_trajectory
from trajectory_store import InvalidTrajectoryError, Provenance, Round, StoreError, Trajectory, TrajectoryStore
from trajectory_store.__main__ import main
from trajectory_store.exchange import export_round, import_file, json_values
from trajectory_store.published import from_records, from_training_row, group_records, to_records
from trajectory_store.thinning import thinned

ROWS = [make_trajectory(f"p{i:02d}", response_tokens=5 + 3 * i) for i in range(20)]


@pytest.fixture
def sealed(round_: Round, provenance: Provenance) -> Round:
    with round_.writer(provenance) as writer:
        for row in ROWS:
            writer.append(row)
    round_.seal(provenance)
    return round_


@pytest.fixture
def other(tmp_path: Path) -> Round:
    return TrajectoryStore(tmp_path / "other").round(1)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_out_and_back(sealed: Round, other: Round, tmp_path: Path, provenance: Provenance, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    assert export_round(sealed.reader(), path, form) == 20  # type: ignore[arg-type]
    assert import_file(path, other, provenance, form).rows == 20  # type: ignore[arg-type]
    assert other.seal(provenance).content_hash == sealed.manifest.content_hash


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_published_trajectories(
    sealed: Round, other: Round, tmp_path: Path, provenance: Provenance, layout: str
) -> None:
    path = tmp_path / "published.json"
    export_round(sealed.reader(), path, "published")
    if layout == "array":  # as the published collector writes it
        path.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    assert import_file(path, other, provenance, "trajectories").rows == 20
    other.seal(provenance)
    assert list(other.reader()) == [replace(row, finished=False) for row in ROWS]


def test_the_overwritten_initial_guess_is_dropped() -> None:
    """In published data iterate 0 shares memory with the fixed point and reads like it."""
    row = make_trajectory("p", response_tokens=3 * BLOCK_SIZE)
    records = list(to_records(row, BLOCK_SIZE))
    for record in records:
        record["answer_trajectory_ids"][0] = record["answer_trajectory_ids"][-1]
    read = from_records(records, BLOCK_SIZE)
    assert read.iterations.tolist() == [max(0, k - 1) for k in row.iterations.tolist()]
    for block, k in enumerate(read.iterations.tolist()):
        for j in range(k + 1):
            assert np.array_equal(read.iterate(block, j, BLOCK_SIZE), row.iterate(block, j + 1, BLOCK_SIZE))


def test_responses_end_at_the_end_token() -> None:
    records = [
        {"data_id": "d", "diffusion_itr_id": "itr_1", "prompt_ids": [[1, 2, 3, 4, 5, 6]],
         "answer_trajectory_ids": [[7, 9, 9, 9], [7, 99, 8, 8]]},
        {"data_id": "d", "diffusion_itr_id": "itr_0", "prompt_ids": [[1, 2]],
         "answer_trajectory_ids": [[3, 8, 8, 8], [3, 4, 8, 6], [3, 4, 5, 6]]},
    ]  # fmt: skip
    row = from_records(records, 4, end_ids=[99])
    assert row.prompt.tolist() == [1, 2]
    assert row.response.tolist() == [3, 4, 5, 6, 7, 99]
    assert row.finished
    assert row.iterations.tolist() == [2, 1]
    assert row.accepted.tolist() == [1, 2, 1]
    assert row.tails.tolist() == [8, 8, 8, 8, 6, 9]
    assert not from_records(records, 4).finished


def test_training_rows(other: Round, tmp_path: Path) -> None:
    line = {
        "data_id": 17,
        "prompt_ids": [1, 2],
        "prompt_ids_len": 2,
        "complete_training_sequence_ids": [1, 2, 3, 8, 8, 8, 3, 4, 5, 6, 7, 9, 9, 9, 7, 99, 8, 8],
        "traj_position_indices": [0, 3],
    }
    row = from_training_row(line, 4, [99])
    assert row.prompt_id == "17"
    assert row.response.tolist() == [3, 4, 5, 6, 7, 99]
    assert row.accepted.tolist() == [1, 1]
    assert row.tails.tolist() == [8, 8, 8, 9]
    path = tmp_path / "training.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"data_id": 18, "traj_position_indices": [0]}) + "\n")
    imported = import_file(path, other, make_provenance(block_size=4), "training", [99])
    assert (imported.rows, imported.rejected) == (1, 1)
    assert "pairs of blocks" in other.rejects()["18"]
    other.seal(make_provenance(block_size=4))
    assert list(other.reader()) == [row]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion_itr_id": "itr_5"}, "missing or doubled"),
        ({"diffusion_itr_id": "x"}, "no number"),
        ({"answer_trajectory_ids": [[1, 2], [1, 2, 3]]}, "lengths"),
        ({"answer_trajectory_ids": "no"}, "not a published"),
        ({"prompt_ids": [1 << 40]}, "not a published"),
    ],
)
def test_bad_records_are_named(change: dict[str, object], message: str) -> None:
    record = next(iter(to_records(ROWS[0], BLOCK_SIZE)))
    with pytest.raises(InvalidTrajectoryError, match=message):
        from_records([record | change], BLOCK_SIZE)


def test_scattered_records_are_refused() -> None:
    a, b = (list(to_records(row, BLOCK_SIZE)) for row in ROWS[5:7])
    with pytest.raises(InvalidTrajectoryError, match="scattered"):
        list(group_records([a[0], b[0], a[1]]))
    with pytest.raises(InvalidTrajectoryError, match="no data_id"):
        list(group_records([{"x": 1}]))
    with pytest.raises(InvalidTrajectoryError, match="no data_id"):
        list(group_records([{"data_id": None}]))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": [2, 3]}\n',
        '[{"a": 1}, {"a": [2, 3]}]',
        ' [ {"a":1},\n{"a":[2,3]}\n]',
        '\ufeff{"a": 1}\n{"a": [2, 3]}\n',  # behind a byte order mark
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_json_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, piece: int) -> None:
    monkeypatch.setattr("trajectory_store.exchange.READ_CHARACTERS", piece)
    path = tmp_path / "x.json"
    path.write_text(text)
    assert list(json_values(path)) == [{"a": 1}, {"a": [2, 3]}]


@pytest.mark.parametrize("content", [b'{"a": 1', b"hello", b'{"a": 1} }', b"\xff\xff"])
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.json"):
        list(json_values(path))


def test_a_failed_export_leaves_no_file(sealed: Round, tmp_path: Path) -> None:
    shard = Path(sealed.folder.path) / sealed.manifest.shards[0].name
    reader = sealed.reader()
    shard.unlink()
    with pytest.raises(StoreError):
        export_round(reader, tmp_path / "out.jsonl", "jsonl")
    with pytest.raises(StoreError, match="nowhere"):
        export_round(reader, tmp_path / "nowhere" / "out.jsonl", "jsonl")
    for folder in (tmp_path, Path()):
        with pytest.raises(StoreError, match="it is a folder"):
            export_round(reader, folder, "jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_file_without_rows_is_refused(other: Round, tmp_path: Path, provenance: Provenance) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(StoreError, match="no usable row"):
        import_file(path, other, provenance, "jsonl")
    path.write_text('{"a": 1}')
    with pytest.raises(StoreError, match="no prompt_id"):
        import_file(path, other, provenance, "jsonl")
    with pytest.raises(StoreError, match="not a Parquet"):
        import_file(path, other, provenance, "parquet")


def exported(**changes: object) -> dict[str, object]:
    """A row as `export --format jsonl` writes it."""
    arrays = {"prompt": [1], "response": [1, 2], "iterations": [1], "accepted": [1], "tails": [5]}
    return {"prompt_id": "a", "finished": True} | arrays | changes


@pytest.mark.parametrize(
    "change",
    [{"tails": [5.5]}, {"tails": [1 << 40]}, {"prompt": [True]}, {"finished": "no"}, {"finished": None}],
    ids=str,
)
def test_values_are_taken_as_they_are_or_not_at_all(
    other: Round, tmp_path: Path, provenance: Provenance, change: dict[str, object]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(exported(prompt_id="good")) + "\n" + json.dumps(exported(**change)))
    assert import_file(path, other, provenance, "jsonl").rejected == 1
    assert next(iter(change)) in other.rejects()["a"]


@pytest.mark.parametrize(
    ("change", "message"), [({"prompt_id": None}, "row 0 has no prompt_id"), ({"prompt_id": "\ud800"}, "UTF-8")]
)
def test_rows_that_cannot_be_named_stop_an_import(
    other: Round, tmp_path: Path, provenance: Provenance, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(exported(**change)))
    with pytest.raises(StoreError, match=message):
        import_file(path, other, provenance, "jsonl")


@pytest.mark.parametrize(
    "change",
    [{"prompt_id": None}, {"prompt": "text"}, {"prompt": None}, {"tails": [1 << 40]}, {"tails": [5.5]}],
    ids=str,
)
def test_parquet_of_other_types_is_refused(
    other: Round, tmp_path: Path, provenance: Provenance, change: dict[str, object]
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([exported(**change)]), path)
    with pytest.raises(StoreError, match="not a Parquet export"):
        import_file(path, other, provenance, "parquet")


def test_parquet_of_wider_types_is_read(other: Round, tmp_path: Path, provenance: Provenance) -> None:
    path = tmp_path / "x.parquet"
    wide = pa.large_list(pa.int64())
    table = pa.Table.from_pylist([exported()])
    columns = [field.with_type(wide) if pa.types.is_list(field.type) else field for field in table.schema]
    pq.write_table(table.cast(pa.schema(columns)), path)
    import_file(path, other, provenance, "parquet")
    other.seal(provenance)
    assert other.reader()[0].tails.tolist() == [5]


def test_a_file_that_is_not_there_leaves_no_round(other: Round, tmp_path: Path, provenance: Provenance) -> None:
    for form in ("jsonl", "parquet", "trajectories", "training"):
        with pytest.raises(StoreError, match="nowhere"):
            import_file(tmp_path / "nowhere", other, provenance, form)
    assert other.folder.entries() == {}


def test_rows_of_one_prompt_that_do_not_count_are_told(
    other: Round, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(exported()) + "\n" + json.dumps(exported(prompt=[2])))
    assert main(["import", str(path), other.folder.path, "--block-size", "8"]) == 0
    assert "1 rows from" in (said := capsys.readouterr().out)
    assert "1 of a prompt that has another row" in said


def test_the_commands(sealed: Round, other: Round, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out.json")
    assert main(["export", sealed.folder.path, target, "--format", "published"]) == 0
    arguments = ["import", target, other.folder.path, "--format", "trajectories", "--block-size", str(BLOCK_SIZE)]
    assert main(arguments) == 0
    assert "20 rows" in capsys.readouterr().out
    assert other.manifest.rows == 20
    assert other.manifest.provenance.config["imported_from"] == "out.json"
    assert main(arguments) == 2
    assert "sealed" in capsys.readouterr().err


def nearest(row: Trajectory, block: int, block_size: int, target: float) -> list[int]:
    """What a noise schedule chooses: the iterate whose noise ratio is nearest."""
    lengths = row.block_lengths(block_size)
    iterates = [row.iterate(block, k, block_size) for k in range(int(row.iterations[block]) + 1)]
    fixed = iterates[-1]
    prefixes = [int(np.cumprod(iterate == fixed).sum()) for iterate in iterates]
    ratios = np.array([1 - prefix / lengths[block] for prefix in prefixes])
    return iterates[int(np.abs(ratios - target).argmin())].tolist()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_thinning_keeps_what_the_schedule_chooses(window: int) -> None:
    ratios = np.linspace(0, 1, window).tolist() if window > 1 else [1.0]
    for row in ROWS:
        thin = thinned(row, BLOCK_SIZE, ratios)
        assert len(thin.accepted) <= min(len(row.accepted), window * len(row.iterations))
        for block in range(len(row.iterations)):
            for ratio in ratios:
                assert nearest(thin, block, BLOCK_SIZE, ratio) == nearest(row, block, BLOCK_SIZE, ratio)


def test_a_thinning_writer_still_counts_every_iteration(sealed: Round, other: Round, provenance: Provenance) -> None:
    with other.writer(provenance, noise_ratios=[0.0, 1.0]) as writer:
        for row in ROWS:
            writer.append(row)
    manifest = other.seal(provenance)
    assert manifest.iterations == sealed.manifest.iterations
    assert list(other.reader()) == [thinned(row, BLOCK_SIZE, [0.0, 1.0]) for row in ROWS]
    assert manifest.bytes < sealed.manifest.bytes
