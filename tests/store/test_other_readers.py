"""A shard is an ordinary Arrow file: pyarrow, Hugging Face datasets, polars and duckdb open it without this package."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from pyarrow import ipc

from tests.store.conftest import make_trajectory
from trajectory_store import Provenance, Round
from trajectory_store.schema import COLUMNS, RowBatch
from trajectory_store.shard import Codec

IDS = [f"p{i:02d}" for i in range(30)]


@pytest.fixture(params=["zstd", "lz4", "none", "zstd, 16 bits"])
def files(round_: Round, provenance: Provenance, request: pytest.FixtureRequest) -> list[str]:
    codec: Codec = request.param.partition(",")[0]
    vocabulary = 512 if "16" in request.param else None
    for part in range(2):
        with round_.writer(provenance, writer_id=f"w{part}", codec=codec, vocabulary_size=vocabulary) as writer:
            for prompt_id in IDS[part::2]:
                writer.append(make_trajectory(prompt_id))
    return [str(Path(round_.folder.path) / name) for name in round_.shard_names()]


def expected(column: str) -> dict[str, list[int]]:
    return {i: getattr(make_trajectory(i), column).tolist() for i in IDS}


def test_pyarrow(files: list[str]) -> None:
    table = ds.dataset(files, format="ipc").to_table()
    assert table.schema.names == list(COLUMNS)
    for column in ("prompt", "response", "iterations", "accepted", "tails"):
        assert dict(zip(table["prompt_id"].to_pylist(), table[column].to_pylist(), strict=True)) == expected(column)


def test_tokens_reach_numpy_without_a_copy(files: list[str]) -> None:
    batch = ipc.open_file(pa.memory_map(files[0])).get_batch(0)
    values = batch["tails"].values
    array = values.to_numpy(zero_copy_only=True)
    assert array.ctypes.data == values.buffers()[1].address
    tails = RowBatch(batch)[0].tails
    assert tails.dtype == "int32"
    assert (tails.ctypes.data == array.ctypes.data) == (array.dtype == "int32")


def test_datasets(files: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert dict(zip(loaded["prompt_id"], loaded["tails"], strict=True)) == expected("tails")


def test_polars(files: list[str]) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.concat([polars.read_ipc(file) for file in files])
    assert dict(zip(frame["prompt_id"].to_list(), frame["tails"].to_list(), strict=True)) == expected("tails")
    assert frame["response_tokens"].to_list() == frame["response"].list.len().to_list()


def test_duckdb(files: list[str]) -> None:
    duckdb = pytest.importorskip("duckdb")
    shards = ds.dataset(files, format="ipc")
    [(total,)] = duckdb.sql("select sum(len(tails)) from shards where response_tokens > 0").fetchall()
    assert shards is not None
    assert total == sum(len(make_trajectory(i).tails) for i in IDS)
