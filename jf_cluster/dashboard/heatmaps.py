"""Two pictures of single responses: how a block's trajectory converges, and what each decode forward adds.

Both put passes of the model from top to bottom and positions of the response from left to right, so that a steeper
staircase is a faster model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jf_cluster.dashboard.gathered import Collected
from jf_cluster.dashboard.picture import Picture, model_name
from jf_cluster.evaluate.looking import Look
from jf_cluster.jacobi.watching import Watched

POSITIONS = 64
"""Positions shown: about what still has cells a person can see."""
TRAJECTORY = {
    "still wrong": "#f3b8a8",
    "right by itself, but something before it is wrong": "#bfe3b4",
    "accepted: right, and everything before it too": "#2f9e44",
}
DECODING = {
    "written by an earlier forward": "#dfe3e8",
    "drafted, not confirmed": "#f3b8a8",
    "drafted behind unverified text (second block)": "#c9b6f2",
    "confirmed draft": "#2f9e44",
    "confirmed, from a recycled n-gram": "#f08c00",
    "the model's own next token": "#1864ab",
}


def trajectories(collected: Sequence[Collected]) -> Picture:
    """First and last model's trajectories of one response, all blocks side by side."""
    shown = _ends(collected)
    grids = [_trajectory(c) for c in shown]
    return _panels(
        "How a model repairs its own guesses",
        "Each block starts as a random guess (top row) and every pass rewrites all of its tokens at once. "
        "Training teaches the model to get there in fewer rows.",
        [f"{model_name(c.model)}: {c.iterations.mean():.1f} passes for a block of {c.block_size}" for c in shown],
        grids,
        [c.words for c in shown],
        TRAJECTORY,
        ("position in the response", "pass of the model"),
    )


def decodings(looks: Sequence[Look], mode: str) -> Picture:
    """First and last model decoding the same held-out prompt, forward by forward."""
    shown = _ends(looks)
    watched = [look.jacobi if mode == "jacobi" else look.multiblock for look in shown]
    drafts = {
        "jacobi": "Each row is one forward pass: it drafts a block of tokens and keeps those the model confirms.",
        "multiblock": "As above, with a second block drafted behind text that is not verified yet, and n-grams of "
        "discarded drafts tried again.",
    }
    return _panels(
        {"jacobi": "Decoding a held-out prompt", "multiblock": "The same prompt, multi-block decoding"}[mode],
        f"{drafts[mode]} One token a row would be autoregressive decoding.",
        [
            f"{model_name(look.round)}: {len(w.tokens)} tokens in {len(w.forwards)} forwards, "
            f"{(len(w.tokens) - 1) / max(len(w.forwards), 1):.2f} a forward"
            for look, w in zip(shown, watched, strict=True)
        ],
        [_decoding(w) for w in watched],
        [look.tokens for look in shown],
        DECODING,
        ("position in the response", "forward pass"),
    )


def _trajectory(collected: Collected) -> np.ndarray:
    """Kind of each token, [passes + 1, positions]: indices into TRAJECTORY."""
    row, n = collected.example, collected.block_size
    lengths = row.block_lengths(n)
    blocks = range(min(len(lengths), max(POSITIONS // n, 1)))
    passes = max(int(row.iterations[b]) for b in blocks)
    grid = np.full((passes + 1, int(sum(lengths[b] for b in blocks))), len(TRAJECTORY) - 1)
    for b in blocks:
        start, fixed = b * n, row.response[b * n : b * n + lengths[b]]
        for k in range(int(row.iterations[b])):
            right = row.iterate(b, k, n) == fixed
            accepted = np.cumprod(right).astype(bool)
            grid[k, start : start + lengths[b]] = right.astype(int) + accepted
    return grid[:, :POSITIONS]


def _decoding(watched: Watched) -> np.ndarray:
    """Kind of each token, [forwards, positions]: indices into DECODING; -1 where nothing was proposed."""
    grid = np.full((len(watched.forwards), POSITIONS), -1)
    for i, forward in enumerate(watched.forwards):
        own = forward.at + forward.accepted - 1
        grid[i, : forward.at] = 0
        grid[i, forward.at : forward.at + forward.active] = 1
        grid[i, forward.at + forward.active : forward.at + forward.drafted] = 2
        grid[i, forward.at : own] = 4 if forward.recycled else 3
        grid[i, own : own + 1] = 5
    reached = next((i for i, f in enumerate(watched.forwards) if f.at >= POSITIONS), len(watched.forwards))
    return grid[:reached, : min(POSITIONS, len(watched.tokens))]


def _panels(
    title: str,
    subtitle: str,
    names: Sequence[str],
    grids: Sequence[np.ndarray],
    words: Sequence[Sequence[str]],
    kinds: dict[str, str],
    axes: tuple[str, str],
) -> Picture:
    """Grids of kinds side by side on the same scale, with a legend."""
    figure = make_subplots(cols=len(grids), subplot_titles=list(names), shared_yaxes=True, horizontal_spacing=0.03)
    colours = list(kinds.values())
    # One flat band of the colour scale for each kind.
    edges = np.linspace(0, 1, len(colours) + 1)
    scale = [(float(e), c) for (a, b), c in zip(pairwise(edges), colours, strict=True) for e in (a, b)]
    for column, (grid, texts) in enumerate(zip(grids, words, strict=True), start=1):
        rows, positions = grid.shape
        shown = [[list(kinds)[k] if k >= 0 else "" for k in row] for row in grid]
        figure.add_trace(
            go.Heatmap(
                z=np.where(grid < 0, np.nan, grid),
                y=list(range(rows)),
                zmin=-0.5,
                zmax=len(colours) - 0.5,
                colorscale=scale,
                showscale=False,
                xgap=1,
                ygap=1,
                text=[list(texts[:positions])] * rows,
                customdata=shown,
                hovertemplate=f"{axes[1]} %{{y}}, {axes[0]} %{{x}}<br>%{{text}}<br>%{{customdata}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=axes[0], row=1, col=column, showgrid=False, zeroline=False)
    for kind, colour in kinds.items():
        marker = {"symbol": "square", "size": 12, "color": colour}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=kind))
    most = max(len(grid) for grid in grids)
    figure.update_yaxes(range=[most - 0.5, -0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(title_text=f"{axes[1]} (top to bottom)", row=1, col=1)
    inner = 11 * max(most, 12)
    figure.update_layout(
        height=150 + inner, legend={"orientation": "h", "y": -60 / inner, "yanchor": "top"}, margin={"b": 110}
    )
    return Picture(title, subtitle, figure)


def _ends(items: Sequence) -> list:
    """The first and the last, or the only one."""
    return [items[0], items[-1]] if len(items) > 1 else list(items)
