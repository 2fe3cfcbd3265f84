#!/usr/bin/env python
"""Evaluate a round's model on the configured task: accuracy and speed of every decoding mode."""

import typer

from jf_cluster.command import DEFAULT_CONFIG, ConfigPath, Overrides, RoundNumber, run


def main(overrides: Overrides = None, config: ConfigPath = DEFAULT_CONFIG, round_number: RoundNumber = None) -> None:
    """Evaluate the model of a round on evaluate.task (default: the held-out prompts): accuracy, agreement with the
    base model, tokens per forward and tokens per second of AR, Jacobi and multi-block decoding, to
    runs/NAME/evaluation. Round 0 is the base.
    """
    run(config, overrides, lambda rounds: rounds.evaluate(round_number), round_number, any_task=True)


if __name__ == "__main__":
    typer.run(main)
