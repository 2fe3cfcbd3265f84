"""The command line, ``python -m trajectory_store ls|rejects|show|stats|verify|compact|export|import``; no logic."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trajectory_store import commands
from trajectory_store.errors import StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 when `verify` found something bad, 2 on errors."""
    options = _parser().parse_args(arguments)
    worst = 0
    try:
        for line, status in options.command(options):
            sys.stdout.write(line + "\n")
            worst = max(worst, status)
        sys.stdout.flush()
    except StoreError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        sys.stderr.close()
    return worst


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trajectory_store", description="Look at and after a store.")
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, action: commands.Command, text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text)
        added.set_defaults(command=action)
        return added

    def many(name: str, action: commands.Command, text: str) -> argparse.ArgumentParser:
        added = command(name, action, text)
        added.add_argument("paths", nargs="+", metavar="PATH", help="a store or one of its rounds, local or a URL")
        return added

    many("ls", commands.ls, "list rounds with what they hold")

    rejects = many("rejects", commands.rejects, "list the prompts given up on, each with its reason")
    rejects.add_argument(
        "--retry",
        action="store_true",
        help="forget them, so that the next collecting of the round tries them again; it must not be sealed",
    )

    show = many("show", commands.show, "draw trajectories: iterates as rows, the accepted prefix coloured")
    show.add_argument("--id", action="append", default=[], metavar="PROMPT_ID", help="prompt to show (repeatable)")
    show.add_argument("--row", action="append", type=int, default=[], help="row number to show (repeatable)")
    show.add_argument("--colour", choices=("auto", "always", "never"), default="auto")

    many("stats", commands.stats, "counts, iterations per block, noise ratios, bytes per token")
    many("verify", commands.verify, "read everything, name every bad or missing file; exit code 1 if there is one")

    compact = many("compact", commands.compact, "rewrite sealed rounds into few large shards, while readers read")
    compact.add_argument("--shard-mib", type=_positive, default=256, help="of a new shard (default: %(default)s)")
    compact.add_argument("--codec", choices=("zstd", "lz4", "none"), default="zstd")

    export = command("export", commands.export, "write a sealed round to one file")
    export.add_argument("path", metavar="ROUND", help="a round, local or a URL")
    export.add_argument("target", help="local file to write")
    export.add_argument(
        "--format",
        choices=("jsonl", "parquet", "published"),
        default="jsonl",
        help="published: trajectory records of the published Jacobi Forcing code (default: %(default)s)",
    )

    bring = command("import", commands.import_, "fill a new round from a file and seal it")
    bring.add_argument("source", help="local file to read")
    bring.add_argument("path", metavar="ROUND", help="the round to make, e.g. runs/mine/store/round-001")
    bring.add_argument(
        "--format",
        choices=("jsonl", "parquet", "trajectories", "training"),
        default="jsonl",
        help="trajectories, training: the published code's trajectory JSON and training JSONL (default: %(default)s)",
    )
    bring.add_argument("--block-size", type=_positive, required=True)
    bring.add_argument(
        "--end-id", action="append", type=int, default=[], help="token that ends a response (repeatable)"
    )
    bring.add_argument(
        "--model-hash",
        default="imported",
        help="of the model that made the trajectories, which training compares with the model it starts from; "
        "`python -m jf_cluster hash MODEL` prints it (default: %(default)s)",
    )
    bring.add_argument("--tokenizer-hash", default="imported", help="printed with it (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
