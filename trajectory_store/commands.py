"""What each command of ``python -m trajectory_store`` does: yields lines of text, each with an exit status."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from trajectory_store.compact import compact_round
from trajectory_store.drawing import draw_bars, draw_trajectory
from trajectory_store.errors import InvalidNameError, RoundNotFoundError, StoreError
from trajectory_store.exchange import export_round, import_file
from trajectory_store.provenance import Provenance
from trajectory_store.reader import TrajectoryReader
from trajectory_store.statistics import NOISE_BINS, round_statistics
from trajectory_store.store import Round, TrajectoryStore
from trajectory_store.trajectory import Trajectory
from trajectory_store.urls import parted, without_secrets
from trajectory_store.verify import verify_round

Lines = Iterator[tuple[str, int]]
Command = Callable[[argparse.Namespace], Lines]


def named_round(path: str) -> Round | None:
    """The round a path names (``.../round-001``), existing or not; None when it names no round."""
    address, parameters = parted(path)
    base, _, last = address.rpartition("/")
    match = re.fullmatch(r"round-(\d{3,})", last)
    return TrajectoryStore((base or ".") + parameters).round(int(match[1])) if match else None


def existing_rounds(path: str) -> list[Round]:
    """The round a path names or all rounds of the store it names.

    Raises:
        RoundNotFoundError: there is none.
    """
    named = named_round(path)
    if named:
        rounds = [named] if named.folder.entries() or named.folder.folders() else []  # one may consist of rejects
    else:
        rounds = TrajectoryStore(path).rounds()
    if not rounds:
        raise RoundNotFoundError(f"{without_secrets(path)} holds no rounds")
    return rounds


def ls(options: argparse.Namespace) -> Lines:
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        if not round_.is_sealed:
            ids, shards = round_.committed_ids(), round_.shard_names()
            rejects = len(round_.rejects())
            yield f"{round_.folder.path}  open    {len(ids):>8} rows  {len(shards):>5} shards  {rejects} rejects", 0
            continue
        manifest = round_.manifest
        yield (
            f"{round_.folder.path}  sealed  {manifest.rows:>8} rows  {len(manifest.shards):>5} shards  "
            f"{manifest.response_tokens:>10} tokens  {manifest.iterations_per_block:6.2f} iterations/block of "
            f"{manifest.provenance.block_size}  {manifest.rejects} rejects  {manifest.bytes / 2**20:.1f} MiB  "
            f"{manifest.content_hash[:12]}",
            0,
        )


def rejects(options: argparse.Namespace) -> Lines:
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        if options.retry:
            round_.require_unsealed()
        found = round_.rejects()
        for prompt_id, reason in found.items():
            yield f"{round_.folder.path}  {prompt_id}  {reason}", 0
        if options.retry:
            round_.forget_rejects(found)
            yield f"{round_.folder.path}: {len(found)} are tried again when the round is collected", 0


def show(options: argparse.Namespace) -> Lines:
    colour = options.colour == "always" or (options.colour == "auto" and sys.stdout.isatty())
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        reader = round_.reader()
        block_size = reader.manifest.provenance.block_size
        for row in _chosen_rows(reader, options.id, options.row):
            yield from ((line, 0) for line in draw_trajectory(row, block_size, colour=colour))


def _chosen_rows(reader: TrajectoryReader, prompt_ids: list[str], numbers: list[int]) -> Iterator[Trajectory]:
    """The rows asked for; the first when none is."""
    for prompt_id in prompt_ids:
        row = reader.find(prompt_id)
        if row is None:
            raise StoreError(f"{reader.where} has no row for the prompt {prompt_id!r}")
        yield row
    for number in numbers or ([0] if not prompt_ids and len(reader) else []):
        if not 0 <= number < len(reader):
            raise StoreError(f"{reader.where} has {len(reader)} rows, counted from 0; there is no row {number}")
        yield reader[number]


def stats(options: argparse.Namespace) -> Lines:
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        s = round_statistics(round_)
        bins = [f"{i / NOISE_BINS:.1f}-{(i + 1) / NOISE_BINS:.1f}" for i in range(NOISE_BINS)]
        lines = [
            f"{round_.folder.path}",
            f"  rows {s.rows} ({s.finished} finished, {s.rejects} rejects)",
            f"  tokens {s.prompt_tokens} prompt, {s.response_tokens} response, {s.tail_tokens} in tails",
            f"  blocks {s.blocks}, iterations per block {s.iterations_per_block:.2f}",
            f"  bytes {s.stored_bytes}, {s.bytes_per_token:.2f} per response token",
            "  blocks by iterations stored:",
            *draw_bars([str(i) for i in range(len(s.iteration_histogram))], s.iteration_histogram.tolist()),
            "  iterates by noise ratio:",
            *draw_bars(bins, s.noise_histogram.tolist()),
        ]
        yield from ((line, 0) for line in lines)


def verify(options: argparse.Namespace) -> Lines:
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        bad = 0
        for finding in verify_round(round_):
            bad += finding.severity == "bad"
            yield f"{finding.severity.upper():4} {round_.folder.path_of(finding.name)}: {finding.what}", int(bad > 0)
        yield f"{round_.folder.path}: {'ok' if not bad else f'{bad} bad'}", 0


def compact(options: argparse.Namespace) -> Lines:
    for round_ in (r for path in options.paths for r in existing_rounds(path)):
        before = round_.manifest
        after = compact_round(round_, options.shard_mib << 20, options.codec)
        shards = f"{len(before.shards)} shards to {len(after.shards)}"
        yield f"{round_.folder.path}: {shards}, {before.bytes / 2**20:.1f} MiB to {after.bytes / 2**20:.1f} MiB", 0


def export(options: argparse.Namespace) -> Lines:
    round_ = _require_named(options.path)
    rows = export_round(round_.reader(), Path(options.target), options.format)
    yield f"{options.target}: {rows} rows of {round_.folder.path} as {options.format}", 0


def import_(options: argparse.Namespace) -> Lines:
    round_ = _require_named(options.path)
    source = Path(options.source)
    provenance = Provenance(
        model_hash=options.model_hash,
        tokenizer_hash=options.tokenizer_hash,
        block_size=options.block_size,
        seed=0,
        round_number=round_.number,
        code_version="imported",
        config={"imported_from": source.name, "format": options.format},
    )
    imported = import_file(source, round_, provenance, options.format, options.end_id)
    manifest = round_.seal(provenance)
    repeated = imported.rows - manifest.rows  # negative when the round was not new
    more = f", {repeated} of a prompt that has another row" if repeated > 0 else ""
    yield f"{round_.folder.path}: {manifest.rows} rows from {source}, {imported.rejected} rejected{more}", 0


def _require_named(path: str) -> Round:
    round_ = named_round(path)
    if round_ is None:
        raise InvalidNameError(f"{without_secrets(path)} names no round; it must end in round-001, round-002, ...")
    return round_
