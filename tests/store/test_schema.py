"""Reading what other versions wrote, and what the package may import."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

import trajectory_store
from tests.store.conftest import make_trajectory
from trajectory_store import (
    CorruptShardError,
    InvalidTrajectoryError,
    Manifest,
    Provenance,
    Round,
    SchemaVersionError,
)
from trajectory_store.checksums import checksum_of
from trajectory_store.compact import compact_round
from trajectory_store.shard import FinishedShard, ShardEncoder, ShardFile, ShardName
from trajectory_store.trajectory import normalised
from trajectory_store.verify import verify_round


def republish(round_: Round, shard: FinishedShard, schema: pa.Schema) -> None:
    """Publish the shard again as another version would have written it."""
    read = ipc.open_file(shard.content)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        for number in range(read.num_record_batches):
            batch = read.get_batch_with_custom_metadata(number)
            arrays = [*batch.batch.columns, pa.array(["new"] * batch.batch.num_rows)][: len(schema)]
            writer.write_batch(pa.record_batch(arrays, schema=schema), custom_metadata=batch.custom_metadata)
    content = sink.getvalue()
    name = ShardName.parse(shard.name)
    assert name is not None
    round_.folder.publish(str(ShardName(name.writer, name.sequence, checksum_of(content))), content)


@pytest.fixture
def shard(provenance: Provenance) -> FinishedShard:
    encoder = ShardEncoder(provenance, "w", 0)
    encoder.add([normalised(make_trajectory("a"), 8)], [1])
    return encoder.finish()


def test_columns_a_newer_version_added_are_ignored(round_: Round, provenance: Provenance, shard: FinishedShard) -> None:
    round_.writer(provenance)
    schema = ipc.open_file(shard.content).schema
    metadata = schema.metadata | {b"trajectory_store.version": b"7"}
    republish(round_, shard, schema.append(pa.field("novelty", pa.string())).with_metadata(metadata))
    assert round_.seal(provenance).rows == 1
    assert list(round_.reader()) == [make_trajectory("a")]


def test_a_shard_that_needs_a_newer_reader_says_so(round_: Round, provenance: Provenance, shard: FinishedShard) -> None:
    round_.writer(provenance)
    schema = ipc.open_file(shard.content).schema
    republish(round_, shard, schema.with_metadata(schema.metadata | {b"trajectory_store.readable_by": b"9"}))
    with pytest.raises(SchemaVersionError, match="version 9"):
        round_.committed_ids()


def test_an_arrow_file_that_is_no_shard_is_refused(round_: Round, provenance: Provenance, shard: FinishedShard) -> None:
    round_.writer(provenance)
    schema = ipc.open_file(shard.content).schema
    republish(round_, shard, schema.with_metadata(None))
    with pytest.raises(CorruptShardError, match="no trajectory shard"):
        round_.committed_ids()


def test_a_small_vocabulary_is_stored_in_16_bits(round_: Round, provenance: Provenance) -> None:
    """Rows, digests and the content hash do not depend on it; one round may hold both."""
    ids = [f"p{i}" for i in range(20)]
    with round_.writer(provenance, writer_id="narrow", vocabulary_size=512) as writer:
        for prompt_id in ids[:10]:
            writer.append(make_trajectory(prompt_id))
        with pytest.raises(InvalidTrajectoryError, match="vocabulary has 512"):
            writer.append(replace(make_trajectory("large"), prompt=np.array([512], np.int32)))
    with round_.writer(provenance, writer_id="wide", vocabulary_size=1 << 17) as writer:
        for prompt_id in ids[10:]:
            writer.append(make_trajectory(prompt_id))
    types = [str(ShardFile(round_.folder, name).tokens) for name in round_.shard_names()]
    assert types == ["uint16", "int32"]
    before = round_.seal(provenance)
    assert list(round_.reader()) == [make_trajectory(i) for i in sorted(ids)]
    assert round_.reader()[0].tails.dtype == np.int32
    assert list(verify_round(round_)) == []
    assert compact_round(round_).content_hash == before.content_hash


@pytest.mark.parametrize("vocabulary_size", [512, None])
def test_rows_that_are_read_cannot_be_written_to(
    round_: Round, provenance: Provenance, vocabulary_size: int | None
) -> None:
    """They are views into what the reader keeps and gives out again; 16-bit tokens are kept in 32 bits."""
    with round_.writer(provenance, vocabulary_size=vocabulary_size) as writer:
        writer.append(make_trajectory("a", response_tokens=20))
    round_.seal(provenance)
    reader = round_.reader()
    row = reader[0]
    with pytest.raises(ValueError, match="read-only"):
        row.response[0] += 1
    assert reader[0] == make_trajectory("a", response_tokens=20)
    arrays = (row.prompt, row.response, row.iterations, row.accepted, row.tails)
    assert reader._layout._cached_bytes == sum(array.nbytes for array in arrays)


def test_manifests_of_other_versions(round_: Round, provenance: Provenance) -> None:
    text = round_.seal(provenance).to_json()
    values = json.loads(text)
    newer = values | {"invention": 1, "provenance": values["provenance"] | {"invention": 1}}
    assert Manifest.from_json(json.dumps(newer), "here") == round_.manifest
    with pytest.raises(SchemaVersionError):
        Manifest.from_json(json.dumps(values | {"readable_by": 99}), "here")


def test_the_package_needs_nothing_but_pyarrow_and_numpy() -> None:
    """But for boto3, which is asked for when something is written to S3 and not before."""
    needed = {*sys.stdlib_module_names, "numpy", "pyarrow", "trajectory_store"}
    for path in Path(trajectory_store.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        on_use = {"boto3", "botocore"} if path.name == "conditional.py" else set()
        for nodes, allowed in ((tree.body, needed), (ast.walk(tree), needed | on_use)):
            for node in nodes:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names.append(node.module or "")
                assert {name.split(".")[0] for name in names} <= allowed, path.name
