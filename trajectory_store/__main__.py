"""The command line: ``python -m trajectory_store ls|show|stats|verify PATH ...``.

PATH is a store or one of its rounds (``runs/tiny/store`` or ``runs/tiny/store/round-001``), local or a URL.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence

from trajectory_store.drawing import draw_bars, draw_trajectory
from trajectory_store.errors import RoundNotFoundError, StoreError
from trajectory_store.statistics import NOISE_BINS, round_statistics
from trajectory_store.store import Round, TrajectoryStore
from trajectory_store.verify import verify_round


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 when `verify` found something bad, 2 on errors."""
    options = _parser().parse_args(arguments)
    try:
        worst = 0
        for path in options.paths:
            for line, status in options.command(path, options):
                sys.stdout.write(line + "\n")
                worst = max(worst, status)
    except StoreError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        sys.stderr.close()
        return 0
    return worst


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trajectory_store", description="Look at a trajectory store.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, action: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("paths", nargs="+", metavar="PATH", help="a store or one of its rounds, local or a URL")
        added.set_defaults(command=action)
        return added

    command("ls", _ls, "list rounds with what they hold")
    show = command("show", _show, "draw trajectories: iterates as rows, the accepted prefix coloured")
    show.add_argument("--id", action="append", default=[], metavar="PROMPT_ID", help="prompt to show (repeatable)")
    show.add_argument("--row", action="append", type=int, default=[], help="row number to show (repeatable)")
    show.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    command("stats", _stats, "counts, iterations per block, noise ratios, bytes per token")
    command("verify", _verify, "read everything and name every bad or missing file; exit code 1 if there is one")
    return parser


def _rounds(path: str) -> list[Round]:
    base, _, last = path.rstrip("/").rpartition("/")
    if match := re.fullmatch(r"round-(\d{3,})", last):
        rounds = [r for r in TrajectoryStore(base or ".").rounds() if r.number == int(match[1])]
    else:
        rounds = TrajectoryStore(path).rounds()
    if not rounds:
        raise RoundNotFoundError(f"{path} holds no rounds")
    return rounds


Lines = Iterator[tuple[str, int]]


def _ls(path: str, options: argparse.Namespace) -> Lines:
    for round_ in _rounds(path):
        if not round_.is_sealed:
            ids, shards = round_.committed_ids(), round_.shard_names()
            yield f"{round_.folder.path}  open    {len(ids):>8} rows  {len(shards):>5} shards", 0
            continue
        manifest = round_.manifest
        yield (
            f"{round_.folder.path}  sealed  {manifest.rows:>8} rows  {len(manifest.shards):>5} shards  "
            f"{manifest.response_tokens:>10} tokens  {manifest.iterations_per_block:6.2f} iterations/block of "
            f"{manifest.provenance.block_size}  {manifest.rejects} rejects  {manifest.bytes / 2**20:.1f} MiB  "
            f"{manifest.content_hash[:12]}",
            0,
        )


def _show(path: str, options: argparse.Namespace) -> Lines:
    colour = options.colour == "always" or (options.colour == "auto" and sys.stdout.isatty())
    for round_ in _rounds(path):
        reader = round_.reader()
        rows = [reader.find(prompt_id) for prompt_id in options.id]
        rows += [reader[number] for number in options.row if number < len(reader)]
        if not options.id and not options.row:
            rows = [reader[0]] if len(reader) else []
        for row in rows:
            if row is not None:
                block_size = reader.manifest.provenance.block_size
                yield from ((line, 0) for line in draw_trajectory(row, block_size, colour=colour))


def _stats(path: str, options: argparse.Namespace) -> Lines:
    for round_ in _rounds(path):
        s = round_statistics(round_)
        bins = [f"{i / NOISE_BINS:.1f}-{(i + 1) / NOISE_BINS:.1f}" for i in range(NOISE_BINS)]
        lines = [
            f"{round_.folder.path}",
            f"  rows {s.rows} ({s.finished} finished, {s.rejects} rejects)",
            f"  tokens {s.prompt_tokens} prompt, {s.response_tokens} response, {s.tail_tokens} in tails",
            f"  blocks {s.blocks}, iterations per block {s.iterations_per_block:.2f}",
            f"  bytes {s.stored_bytes}, {s.bytes_per_token:.2f} per response token",
            "  blocks by iterations needed:",
            *draw_bars([str(i) for i in range(len(s.iteration_histogram))], s.iteration_histogram.tolist()),
            "  iterates by noise ratio:",
            *draw_bars(bins, s.noise_histogram.tolist()),
        ]
        yield from ((line, 0) for line in lines)


def _verify(path: str, options: argparse.Namespace) -> Lines:
    for round_ in _rounds(path):
        bad = 0
        for finding in verify_round(round_):
            bad += finding.severity == "bad"
            yield f"{finding.severity.upper():4} {round_.folder.path_of(finding.name)}: {finding.what}", int(bad > 0)
        yield f"{round_.folder.path}: {'ok' if not bad else f'{bad} bad'}", 0


if __name__ == "__main__":
    sys.exit(main())
