#!/usr/bin/env python
"""Train a round: DeepSpeed ZeRO-3 on the round's trajectories, from the model before it."""

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, MadeRound, Overrides, run


def main(overrides: Overrides = None, config: ConfigPath = DEFAULT_CONFIG, round_number: MadeRound = None) -> None:
    """Train the model of a round on the round's trajectories with DeepSpeed ZeRO-3 and export it as a Hugging Face
    directory under runs/NAME/models. Trajectories and models that are missing before it are made first.

    Only what is missing is done; interrupted anywhere, the same command carries on from the last checkpoint.
    """
    run(config, overrides, lambda rounds: rounds.train(round_number), round_number)


if __name__ == "__main__":
    typer.run(main)
