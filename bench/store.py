"""``python -m bench.store``: bytes and rates of the trajectory store against the published JSON and MosaicML's MDS.

The rows are real trajectories (``--store``, or collected here with the project's own model), repeated under different
renamings of the vocabulary until there are enough of them, so that no compressor gains from the repetition. One process
reads or writes at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.mds import MDS_ENVIRONMENT, Mds
from bench.measure import alternate, median, parser, ratio, report
from trajectory_store import Provenance, Round, Trajectory, TrajectoryStore
from trajectory_store.published import to_records
from trajectory_store.shard import Codec

CODECS: tuple[Codec, ...] = ("none", "lz4", "zstd")


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--store", help="a sealed round to take trajectories from, e.g. runs/tiny/store/round-001")
    p.add_argument("--prompts", type=int, default=128, help="prompts to collect when no --store is given")
    p.add_argument("--rows", type=int, default=10_000)
    p.add_argument("--shards", type=int, default=10_000, help="shards of the round whose opening is timed")
    p.add_argument("--mds-environment", type=Path, default=MDS_ENVIRONMENT)
    p.add_argument("--without-mds", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        folder = Path(name)
        rows, provenance = _rows(args, folder)
        tokens = sum(len(row.response) for row in rows)
        block_size = provenance.block_size
        few = rows[: max(1, len(rows) // 10)]  # the published JSON is too slow to read all of it each time
        share = sum(len(row.response) for row in few) / tokens

        ours = TrajectoryStore(folder / "ours").round(1)
        write(ours, provenance, rows)
        ours.seal(provenance)
        write_published(folder / "published.jsonl", few, block_size)
        sides = {
            "read": lambda: _touch(ours.reader().scan()),
            "read_unverified": lambda: _touch(ours.reader(verify=False).scan()),
            "write": lambda: write(fresh_round(folder / "written"), provenance, rows),
            "read_jsonl": lambda: read_published(folder / "published.jsonl"),
            "write_jsonl": lambda: write_published(folder / "again.jsonl", few, block_size),
        }
        mds = None if args.without_mds else Mds(args.mds_environment, folder)
        if mds:
            sides |= {"write_mds": lambda: mds.run("write"), "read_mds": lambda: mds.run("read")}
            mds.run("write")
        seconds = alternate(sides, args.repeats)
        for side in ("read_jsonl", "write_jsonl"):
            seconds[side] = [s / share for s in seconds[side]]

        published_bytes = (folder / "published.jsonl").stat().st_size / share
        figures: dict[str, float | int | str] = {
            "block_size": block_size,
            "rows": len(rows),
            "response_tokens": tokens,
            "iterations_per_block": ours.manifest.iterations_per_block,
            "bytes_per_token": ours.manifest.bytes / tokens,
            "bytes_per_token_published_json": published_bytes / tokens,
            "ratio_bytes_vs_published_json": ours.manifest.bytes / published_bytes,
            "bytes_per_token_thinned_to_4_ratios": thinned_bytes(folder, provenance, rows) / tokens,
            **{f"tokens_per_s_{side}": tokens / median(series) for side, series in seconds.items()},
            "ratio_read_vs_jsonl": ratio(seconds["read_jsonl"], seconds["read"]),
            "ratio_write_vs_jsonl": ratio(seconds["write_jsonl"], seconds["write"]),
        }
        if mds:
            plain, compressed = mds.bytes("plain"), mds.bytes("zstd")
            figures |= {
                "bytes_per_token_mds": plain / tokens,
                "bytes_per_token_mds_zstd": compressed / tokens,
                "ratio_bytes_vs_mds": ours.manifest.bytes / plain,
                "ratio_bytes_vs_mds_zstd": ours.manifest.bytes / compressed,
                "ratio_read_vs_mds": ratio(seconds["read_mds"], seconds["read"]),
                "ratio_write_vs_mds": ratio(seconds["write_mds"], seconds["write"]),
            }
            mds.close()
        figures |= codec_figures(folder, provenance, few, args.repeats)
        figures |= opening_figures(provenance, rows, args.shards)
        figures |= memory_figures(folder, provenance, rows)
        report("trajectory store", figures, args.json)


def _rows(args: argparse.Namespace, folder: Path) -> tuple[list[Trajectory], Provenance]:
    """Enough rows: real trajectories, again and again with their tokens renamed."""
    if args.store:
        base, _, number = args.store.rstrip("/").rpartition("/round-")
        round_ = TrajectoryStore(base).round(int(number))
    else:
        round_ = _collect(args, folder)
    reader = round_.reader()
    real = [reader[i] for i in range(min(len(reader), args.rows))]
    size = vocabulary_size(real)
    rows: list[Trajectory] = []
    for copy in range(-(-args.rows // len(real))):
        names = np.random.default_rng(copy).permutation(size).astype(np.int32)
        for row in real[: args.rows - len(rows)]:
            tokens = {field: names[getattr(row, field)] for field in ("prompt", "response", "tails")}
            rows.append(replace(row, prompt_id=f"{row.prompt_id}-{copy:04d}", **tokens))
    return rows, replace(reader.manifest.provenance, round_number=1)


def _collect(args: argparse.Namespace, folder: Path) -> Round:
    """Trajectories of the project's own model on held-out problems."""
    from bench import tiny_inputs
    from jf_cluster.jacobi.responses import generate_responses
    from jf_cluster.jacobi.trajectories import trace

    model = tiny_inputs.load(tiny_inputs.TINY, args.device)
    prompts, end = tiny_inputs.prompts(tiny_inputs.TINY, args.prompts)
    responses = generate_responses(model, prompts, max_new_tokens=192, end_ids=[end])
    traces = trace(model, prompts, [r.tokens for r in responses], block_size=16, keys=range(len(prompts)))
    provenance = Provenance("bench", "bench", 16, 0, 1, "bench", {})
    round_ = TrajectoryStore(folder / "collected").round(1)
    with round_.writer(provenance) as writer:
        for i, (prompt, response, t) in enumerate(zip(prompts, responses, traces, strict=True)):
            arrays = (t.iterations, t.accepted, t.tails)
            writer.append(Trajectory(f"held-out-{i:05d}", prompt, response.tokens, response.finished, *arrays))
    round_.seal(provenance)
    return round_


def write(round_: Round, provenance: Provenance, rows: list[Trajectory], codec: Codec = "zstd") -> None:
    with round_.writer(provenance, codec=codec, vocabulary_size=vocabulary_size(rows)) as writer:
        for row in rows:
            writer.append(row)


def fresh_round(folder: Path) -> Round:
    shutil.rmtree(folder, ignore_errors=True)
    return TrajectoryStore(folder).round(1)


def vocabulary_size(rows: list[Trajectory]) -> int:
    return 1 + max(int(tokens.max(initial=0)) for row in rows for tokens in (row.prompt, row.response, row.tails))


def _touch(rows: Iterator[Trajectory]) -> int:
    return sum(len(row.tails) for row in rows)


def write_published(path: Path, rows: list[Trajectory], block_size: int) -> None:
    with path.open("w") as file:
        for row in rows:
            for record in to_records(row, block_size):
                file.write(json.dumps(record) + "\n")


def read_published(path: Path) -> int:
    with path.open() as file:
        return sum(len(json.loads(line)["answer_trajectory_ids"]) for line in file)


def thinned_bytes(folder: Path, provenance: Provenance, rows: list[Trajectory]) -> int:
    """Bytes when only iterates are kept that a window of four blocks can choose."""
    round_ = TrajectoryStore(folder / "thinned").round(1)
    size = vocabulary_size(rows)
    with round_.writer(provenance, noise_ratios=[0, 1 / 3, 2 / 3, 1], vocabulary_size=size) as writer:
        for row in rows:
            writer.append(row)
    return round_.seal(provenance).bytes


def codec_figures(folder: Path, provenance: Provenance, rows: list[Trajectory], repeats: int) -> dict[str, float]:
    """Bytes and read rate of each codec on the same rows."""
    tokens = sum(len(row.response) for row in rows)
    rounds = {}
    for codec in CODECS:
        rounds[codec] = TrajectoryStore(folder / f"codec-{codec}").round(1)
        write(rounds[codec], provenance, rows, codec)
        rounds[codec].seal(provenance)
    seconds = alternate({c: lambda r=r: _touch(r.reader().scan()) for c, r in rounds.items()}, repeats)
    sizes = {f"codec_bytes_per_token_{c}": r.manifest.bytes / tokens for c, r in rounds.items()}
    return sizes | {f"codec_tokens_per_s_read_{c}": tokens / median(s) for c, s in seconds.items()}


def opening_figures(provenance: Provenance, rows: list[Trajectory], shards: int) -> dict[str, float | int]:
    """Seconds to open a sealed round of very many shards and read its first row."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None  # ten thousand flushes to disk are not what is measured
    with tempfile.TemporaryDirectory(dir=place) as name:
        round_ = TrajectoryStore(name).round(1)
        with round_.writer(provenance, writer_id="w") as writer:
            for i in range(shards):
                writer.append(replace(rows[i % len(rows)], prompt_id=f"{i:06d}"))
                writer.commit()
        begun = time.perf_counter()
        round_.seal(provenance)
        sealed = time.perf_counter()
        reader = TrajectoryStore(name).round(1).reader()
        _ = reader[0]
        opened = time.perf_counter()
    return {"shards": shards, "seconds_to_open": opened - sealed, "seconds_to_seal": sealed - begun}


MEMORY_CHILD = """
import sys
from trajectory_store import TrajectoryStore
reader = TrajectoryStore(sys.argv[1]).round(1).reader(cache_bytes=2 << 20)
for i in range(0, len(reader), 3):
    reader[i]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


def memory_figures(folder: Path, provenance: Provenance, rows: list[Trajectory]) -> dict[str, float]:
    """Private memory of a process that has read all over a store, for a store and one eight times its size."""
    if not Path("/proc/self/status").exists():
        return {}
    figures = {}
    for name, part in (("eighth", rows[: len(rows) // 8]), ("whole", rows)):
        round_ = TrajectoryStore(folder / f"memory-{name}").round(1)
        write(round_, provenance, part)
        round_.seal(provenance)
        command = [sys.executable, "-c", MEMORY_CHILD, str(folder / f"memory-{name}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[f"reader_private_mib_{name}"] = int(done.stdout) / 1024
    return figures


if __name__ == "__main__":
    main()
