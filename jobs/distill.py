#!/usr/bin/env python
"""Run the whole chain: collect, train and evaluate, round after round."""

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, LastRound, Overrides, run


def main(overrides: Overrides = None, config: ConfigPath = DEFAULT_CONFIG, round_number: LastRound = None) -> None:
    """Run all rounds: evaluate the base, then for each round collect trajectories, train on them and evaluate the
    model; at the end collect once more with the last model and print one table. --round says how many rounds.

    Only what is missing is done; interrupted anywhere, the same command carries on.
    """
    rounds = [] if round_number is None else [f"rounds={round_number}"]
    run(config, [*(overrides or []), *rounds], lambda every: every.distill())


if __name__ == "__main__":
    typer.run(main)
