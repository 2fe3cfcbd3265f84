"""A round of very many prompts: listed, resumed, sealed and planned, each in a fresh process. Part of bench.scale."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from bench import tiny_inputs
from bench.measure import Value, in_fresh_process
from trajectory_store import Provenance, Round, SealedRows, TrajectoryStore
from trajectory_store.checksums import checksum_of, column_checksums
from trajectory_store.schema import schema
from trajectory_store.shard import ZSTD_LEVEL, ShardName

if TYPE_CHECKING:
    from jf_cluster.collect.prompts import Prompts
    from jf_cluster.config import Config

PROVENANCE = Provenance("bench", "bench", 16, 0, 1, "bench", {})
BATCH_ROWS = 100
"""Rows of a record batch: those of the embedded run have 170, with responses of 600 tokens about 25."""
SHARD_ROWS = 10_000
"""Rows of a shard: 64 MiB hold so many responses of 600 tokens."""
LEFT_SHARE, REJECTED_SHARE = 0.01, 0.0005
LOOK_EVERY_S = 0.02
RANKS, MICRO_BATCH_TOKENS = 256, 256
"""A micro-batch of so many tokens has about as many of these small samples as one of 32,768 has of real ones."""


def prompt_figures(folder: Path, count: int) -> dict[str, Value]:
    """Seconds and most resident memory of what a driver and a training rank do with ``count`` prompts."""
    write_source(folder / "prompts.jsonl", count)
    cache = folder / "cache"
    steps: dict[str, Callable[[Path, int], float]] = {
        "list_first": list_prompts,
        "list": list_prompts,
        "write": write_round,
        "resume": resume,
        "seal": seal,
        "plan": plan,
    }
    figures: dict[str, Value] = {"prompts": count}
    for name, step in steps.items():
        seconds, peak_mib, own_peak_mib = in_fresh_process(_peak_of, step, folder, count, str(cache))
        if name != "write":
            figures |= {f"{name}_s": seconds, f"{name}_peak_mib": peak_mib, f"{name}_own_peak_mib": own_peak_mib}
    shutil.rmtree(cache, ignore_errors=True)
    return figures


def _peak_of(step: Callable[[Path, int], float], folder: Path, count: int, cache: str) -> tuple[float, float, float]:
    """Seconds that a step says it took, the process's most resident memory, and the most without mapped files."""
    os.environ["HF_DATASETS_CACHE"] = cache
    own_peak, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal own_peak
        while not over.wait(LOOK_EVERY_S):
            own_peak = max(own_peak, _memory_mib("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        seconds = step(folder, count)
    finally:
        over.set()
        watching.join()
    return seconds, _memory_mib("VmHWM"), own_peak


def _memory_mib(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def write_source(path: Path, count: int) -> None:
    """A file of distinct texts of which more than ``count`` are training prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = count * 16 // 15 + count // 100 + 1000
    with path.open("w") as file:
        for start in range(0, texts, 10_000):
            file.writelines(
                f'{{"question": "How many stamps has Ada, who had {i} of them and bought {i % 97} more?"}}\n'
                for i in range(start, min(start + 10_000, texts))
            )


def _config(folder: Path, count: int) -> Config:
    from jf_cluster.config import Config

    return Config.model_validate(
        {
            "name": "many",
            "runs_dir": folder / "runs",
            "model": {"path": str(tiny_inputs.TINY)},
            "prompts": {"source": str(folder / "prompts.jsonl"), "per_round": count, "held_out": 100},
            "train": {"micro_batch_tokens": MICRO_BATCH_TOKENS, "micro_batches_per_step": RANKS, "workers": 1},
        }
    )


def _prompts(folder: Path, count: int) -> Prompts:
    from jf_cluster.collect.prompts import load_prompts
    from jf_cluster.models import load_tokenizer

    config = _config(folder, count)
    return load_prompts(config, load_tokenizer(config), 1)


def round_of(folder: Path, count: int) -> Round:
    return TrajectoryStore(_config(folder, count).store_url).round(1)


def list_prompts(folder: Path, count: int) -> float:
    """Read the source, tell the splits apart, drop what comes twice, give every prompt its id."""
    begun = time.perf_counter()
    assert len(_prompts(folder, count).ids()) == count
    return time.perf_counter() - begun


def resume(folder: Path, count: int) -> float:
    """List the prompts, find which are left, and make the first batch of them."""
    from jf_cluster.collect.batches import batches_of, left_over

    begun = time.perf_counter()
    prompts, round_ = _prompts(folder, count), round_of(folder, count)
    left = left_over(prompts, round_)
    first = next(batches_of(_config(folder, count), prompts, left))
    seconds = time.perf_counter() - begun
    expected = count - _committed(count) - _rejected(count)
    assert len(left) == expected and len(first) == min(64, expected), (len(left), expected)
    return seconds


def seal(folder: Path, count: int) -> float:
    """Fix the round's content: index and manifest."""
    begun = time.perf_counter()
    assert round_of(folder, count).seal(PROVENANCE).rows == _committed(count)
    return time.perf_counter() - begun


def plan(folder: Path, count: int) -> float:
    """Open the round, put its rows in order and plan the first two steps of a training rank."""
    import torch

    from jf_cluster.train.batches import BatchSource
    from jf_cluster.train.plan import TrainingPlan

    config = _config(folder, count)
    begun = time.perf_counter()
    rows = SealedRows(round_of(folder, count))
    rows.prompts_digest()  # what training is said to be of
    source = BatchSource(rows, config, 1, torch.device("cpu"))
    train = config.train
    planned = TrainingPlan(
        len(rows), source.lengths, config.seed, train.micro_batch_tokens, train.micro_batches_per_step,
        train.packing_rows,
    )  # fmt: skip
    for step in (0, 1):
        assert len(planned.share(step, RANKS - 1, RANKS)) == 1
    return time.perf_counter() - begun


def _committed(count: int) -> int:
    return count - max(1, int(count * LEFT_SHARE)) - _rejected(count)


def _rejected(count: int) -> int:
    return max(1, int(count * REJECTED_SHARE))


def write_round(folder: Path, count: int) -> float:
    """Commit most of the prompts and reject some, in an order that is not theirs."""
    begun = time.perf_counter()
    ids, round_ = _prompts(folder, count).ids(), round_of(folder, count)
    with round_.writer(PROVENANCE):
        pass  # registers what the rows have in common
    mixed = ids.take(pa.array(np.random.default_rng(1).permutation(count)))
    committed = _committed(count)
    for shard, start in enumerate(range(0, committed, SHARD_ROWS)):
        rows = mixed.slice(start, min(SHARD_ROWS, committed - start)).cast(pa.string())
        name, content = _encoded(rows, shard)
        round_.folder.publish(name, content)
    for prompt_id in mixed.slice(committed, _rejected(count)).to_pylist():
        round_.reject(prompt_id, "too long for a reason that the benchmark does not know")
    return time.perf_counter() - begun


def _encoded(ids: pa.Array, shard: int) -> tuple[str, pa.Buffer]:
    """A shard as the store writes them, made of whole columns: one by one ten million rows take many minutes."""
    place, columns, sink = ShardName("bench", shard, ""), schema(PROVENANCE), pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=pa.Codec("zstd", ZSTD_LEVEL))
    with ipc.new_file(sink, columns, options=options) as writer:
        for number, batch in enumerate(_batches(ids, columns, np.random.default_rng(shard))):
            writer.write_batch(batch, custom_metadata=column_checksums(batch, place.place, number))
    content = sink.getvalue()
    return str(ShardName("bench", shard, checksum_of(content))), content


def _batches(ids: pa.Array, columns: pa.Schema, random: np.random.Generator) -> Iterator[pa.RecordBatch]:
    """Rows of four prompt and four response tokens, one block of one iteration each."""
    for start in range(0, len(ids), BATCH_ROWS):
        here = pa.array(ids.slice(start, BATCH_ROWS).to_pylist(), pa.string())
        count = len(here)
        four = np.tile(np.arange(4, dtype=np.int32), count)
        by_four = pa.array(np.arange(0, 4 * count + 1, 4, dtype=np.int32))
        by_one = pa.array(np.arange(count + 1, dtype=np.int32))
        lists = {
            "prompt": (by_four, four), "response": (by_four, four), "tails": (by_four, four),
            "iterations": (by_one, np.ones(count, np.int32)), "accepted": (by_one, np.zeros(count, np.int32)),
        }  # fmt: skip
        values = {
            "prompt_id": here,
            "digest": pa.array([random.bytes(16) for _ in range(count)], pa.binary()),
            "prompt_tokens": pa.array(np.full(count, 4, np.int32)),
            "response_tokens": pa.array(np.full(count, 4, np.int32)),
            "iteration_count": pa.array(np.ones(count, np.int32)),
            "finished": pa.array(np.ones(count, bool)),
        } | {
            name: pa.ListArray.from_arrays(offsets, pa.array(items), type=columns.field(name).type)
            for name, (offsets, items) in lists.items()
        }
        yield pa.record_batch([values[name] for name in columns.names], schema=columns)
