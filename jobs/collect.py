#!/usr/bin/env python
"""Collect a round: Ray actors decode its prompts with the newest model and store the Jacobi trajectories."""

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, MadeRound, Overrides, run


def main(overrides: Overrides = None, config: ConfigPath = DEFAULT_CONFIG, round_number: MadeRound = None) -> None:
    """Collect the Jacobi trajectories of a round: its prompts are decoded by Ray actors with the model of the round
    before and written to the trajectory store, runs/NAME/store. Models that are missing before it are trained first.

    Only what is missing is done; interrupted anywhere, the same command carries on.
    """
    run(config, overrides, lambda rounds: rounds.collect(round_number), round_number)


if __name__ == "__main__":
    typer.run(main)
