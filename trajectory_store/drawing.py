"""Text for the terminal: a trajectory with its iterates as rows, and histograms as bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from trajectory_store.trajectory import Trajectory

ACCEPTED, NOISE, PLAIN, DIM = "\x1b[32m", "\x1b[31m", "\x1b[0m", "\x1b[2m"


def draw_trajectory(
    trajectory: Trajectory, block_size: int, *, colour: bool, token_text: Callable[[int], str] = str
) -> Iterator[str]:
    """Lines that show each block's iterates, accepted prefix in green, the rest in red.

    Without colour the accepted prefix ends in ``|``.
    """
    ending = "finished" if trajectory.finished else "cut at the length limit"
    tokens = f"{len(trajectory.prompt)} prompt and {len(trajectory.response)} response tokens"
    yield f"{trajectory.prompt_id}: {tokens}, {ending}"
    width = max((len(token_text(int(t))) for t in (*trajectory.response, *trajectory.tails)), default=1)
    entry = 0
    for block, length in enumerate(trajectory.block_lengths(block_size).tolist()):
        steps = int(trajectory.iterations[block])
        yield f"block {block}: {length} tokens, {steps} iterations"
        for k in range(steps + 1):
            accepted = int(trajectory.accepted[entry + k]) if k < steps else length
            cells = [token_text(int(token)).rjust(width) for token in trajectory.iterate(block, k, block_size)]
            good, bad = " ".join(cells[:accepted]), " ".join(cells[accepted:])
            label = f"{k:4d} " if k < steps else " fix "
            if colour:
                yield f"{DIM}{label}{PLAIN} {ACCEPTED}{good}{PLAIN} {NOISE}{bad}{PLAIN}"
            else:
                yield f"{label} {good} | {bad}".rstrip()
        entry += steps


def draw_bars(labels: Sequence[str], counts: Sequence[int], width: int = 40) -> Iterator[str]:
    """One line per label with a bar proportional to its count."""
    largest = max([*counts, 1])
    room = max((len(label) for label in labels), default=0)
    for label, number in zip(labels, counts, strict=True):
        yield f"  {label.rjust(room)} {'█' * round(width * number / largest)} {number}"
