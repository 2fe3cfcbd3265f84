"""``python -m bench.planning``: what it costs one rank to plan a step and to know its samples' lengths, by ranks.

A step has a micro-batch of ``--tokens`` for every rank. ``alone``: a rank works out the lengths of all samples, which
it reads for that, as it was. ``shared``: it does its part, and the others' lengths are there, as if they had just come;
what an exchange costs is measured apart, of 1,024 lengths between so many processes (more than cores: they wait).
The trajectories are made up, of the size that the tables of docs/scaling.md assume, and lie in a sealed round.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bench.measure import Value, alternate, median, parser, ratio, report
from jf_cluster.config import Config
from jf_cluster.train.batches import BatchSource
from jf_cluster.train.plan import TrainingPlan
from jf_cluster.train.sharing import Sharing, Work, alone
from trajectory_store import Provenance, SealedRows, Trajectory, TrajectoryStore

BLOCK, PROMPT, RESPONSE = 16, 200, 600
EXCHANGES = 50


def main() -> None:
    p = parser(__doc__ or "")
    p.set_defaults(repeats=2)
    p.add_argument("--tokens", type=int, default=32_768)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512])
    p.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], help="that exchange a window's lengths")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Value] = {}
    with tempfile.TemporaryDirectory(prefix="bench-planning-") as name:
        sample_tokens = PROMPT + RESPONSE * 1.5
        rows = _sealed(Path(name), int(2 * args.tokens * max(args.ranks) / sample_tokens))
        for ranks in args.ranks:
            figures |= _step(rows, ranks, args.tokens, args.repeats)
        for processes in args.processes:
            figures[f"ms_exchange_{processes}_processes"] = _exchange(Path(name), processes)
    report("planning", figures, args.json)


def _step(rows: SealedRows, ranks: int, tokens: int, repeats: int) -> dict[str, Value]:
    """Milliseconds for a step of so many ranks; the CPU's own time, as other work may share the cores."""
    config = Config.model_validate({})
    known = np.zeros(len(rows), np.int64)

    def first_of(count: int, work: Work) -> NDArray[np.int64]:
        part = slice(0, count, ranks)
        window = next(windows)
        together = known[window]
        together[part] = work(part)
        return together

    def plan(source: BatchSource) -> TrainingPlan:
        return TrainingPlan(len(rows), source.lengths, 0, tokens, ranks, config.train.packing_rows)

    whole = BatchSource(rows, config, 1, torch.device("cpu"), alone)
    seen: list[NDArray[np.int64]] = []

    def recorded(epoch: int, window: NDArray[np.int64]) -> NDArray[np.int64]:
        seen.append(window)
        known[window] = whole.lengths(epoch, window)
        return known[window]

    expected = TrainingPlan(len(rows), recorded, 0, tokens, ranks, config.train.packing_rows).step(0)
    windows = iter(seen)

    def shared() -> None:
        nonlocal windows
        windows = iter(seen)
        assert plan(BatchSource(rows, config, 1, torch.device("cpu"), first_of)).step(0) == expected

    sides = {"alone": lambda: plan(whole).step(0), "shared": shared}
    seconds = alternate(sides, repeats, clock=time.process_time)
    return {
        f"samples_of_{ranks}_ranks": sum(map(len, seen)),
        f"exchanges_of_{ranks}_ranks": len(seen),
        f"ratio_shared_vs_alone_{ranks}_ranks": ratio(seconds["shared"], seconds["alone"]),
        **{f"ms_{side}_{ranks}_ranks": 1000 * median(series) for side, series in seconds.items()},
    }


def _exchange(folder: Path, processes: int) -> float:
    """Milliseconds in which so many processes of this machine put the lengths of a window together."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        meeting = f"file://{folder / f'meeting-{processes}'}"
        return max(pool.starmap(_exchanging, [(meeting, rank, processes) for rank in range(processes)], chunksize=1))


def _exchanging(meeting: str, rank: int, processes: int) -> float:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    share = Sharing(rank, processes)
    share(1024, _nothing)
    begun = time.perf_counter()
    for _ in range(EXCHANGES):
        share(1024, _nothing)
    seconds = time.perf_counter() - begun
    dist.destroy_process_group()
    return 1000 * seconds / EXCHANGES


def _nothing(part: slice) -> NDArray[np.int64]:
    return np.zeros(len(range(*part.indices(1024))), np.int64)


def _sealed(folder: Path, count: int) -> SealedRows:
    """A round of so many trajectories whose blocks need four iterations on average."""
    rng = np.random.default_rng(0)
    provenance = Provenance("m" * 64, "t" * 64, block_size=BLOCK, seed=0, round_number=1, code_version="0", config={})
    round_ = TrajectoryStore(folder).round(1)
    with round_.writer(provenance) as writer:
        for number in range(count):
            writer.append(_trajectory(f"prompt-{number:06d}", rng))
    round_.seal(provenance)
    return SealedRows(round_)


def _trajectory(prompt_id: str, rng: np.random.Generator) -> Trajectory:
    prompt, response = (rng.integers(0, 32_000, n, dtype=np.int32) for n in (PROMPT, RESPONSE))
    iterations, accepted, tails = [], [], []
    for begin in range(0, RESPONSE, BLOCK):
        block = response[begin : begin + BLOCK]
        prefixes = np.sort(rng.choice(len(block), int(rng.integers(1, min(8, len(block) + 1))), replace=False))
        iterations.append(len(prefixes))
        for prefix in prefixes.tolist():
            accepted.append(prefix)
            tails.append(block[prefix:] + 1)  # no token that is accepted
    as_int = (np.array(values, np.int32) for values in (iterations, accepted, np.concatenate(tails)))
    return Trajectory(prompt_id, prompt, response, True, *as_int)


if __name__ == "__main__":
    main()
