"""Pictures of whole rounds: iterations, accuracy against speed, settings, acceptance, throughput."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jf_cluster.dashboard.gathered import Collected, Rate
from jf_cluster.dashboard.picture import Picture, model_name
from jf_cluster.evaluate.evaluation import Evaluation, Mode
from jf_cluster.evaluate.looking import BLOCK_SIZES, BLOCKS, Look

COLOURS = ("#868e96", "#1864ab", "#2f9e44", "#f08c00", "#9c36b5", "#e03131", "#0b7285", "#5c940d")
STAGE_COLOURS = {"collect": "#1864ab", "train": "#2f9e44"}


def iterations(collected: Sequence[Collected]) -> Picture:
    """Distribution of iterations per block, model by model."""
    figure = go.Figure()
    for c in collected:
        share = 100 * np.bincount(c.iterations, minlength=c.block_size + 1)[1:] / len(c.iterations)
        figure.add_trace(
            go.Bar(x=np.arange(1, c.block_size + 1), y=share, name=model_name(c.model), marker_color=_colour(c.model))
        )
        figure.add_vline(
            x=c.iterations.mean(),
            line={"color": _colour(c.model), "dash": "dot", "width": 2},
            annotation={"text": f"{c.iterations.mean():.1f}", "font": {"color": _colour(c.model)}},
        )
    return Picture(
        "Passes until a whole block is right, model by model",
        "A model that writes one token at a time needs as many passes as a block has tokens. "
        "Each round of training moves the bars to the left; dotted lines are means.",
        _labelled(figure, "passes of the model until the block no longer changes", "share of blocks, %"),
    )


def speed_and_accuracy(evaluations: Sequence[Evaluation]) -> Picture:
    """Tokens per forward against accuracy, round by round, in both modes, with the AR point."""
    figure = go.Figure()
    graded = [e for e in evaluations if e.ar.accuracy is not None]
    styles: tuple[tuple[Mode, str, str], ...] = (
        ("jacobi", "circle", "#1864ab"),
        ("multiblock", "diamond", "#9c36b5"),
    )
    for mode, symbol, colour in styles:
        figure.add_trace(
            go.Scatter(
                x=[e.mode(mode).tpf for e in graded],
                y=[100 * (e.mode(mode).accuracy or 0.0) for e in graded],
                text=[str(e.round) for e in graded],
                mode="lines+markers+text",
                textfont={"color": "white", "size": 12},
                marker={"symbol": symbol, "size": 22, "line": {"width": 1, "color": "white"}},
                customdata=[model_name(e.round) for e in graded],
                hovertemplate="%{customdata}: %{x:.2f} tokens per forward, %{y:.1f}% right<extra></extra>",
                line={"color": colour},
                error_y=_interval(graded, mode),
                name={"jacobi": "Jacobi decoding", "multiblock": "multi-block decoding"}[mode],
            )
        )
        failed = [e for e in graded if not e.passed]
        if failed and mode == "jacobi":
            figure.add_trace(
                go.Scatter(
                    x=[e.jacobi.tpf for e in failed],
                    y=[100 * (e.jacobi.accuracy or 0.0) for e in failed],
                    mode="markers",
                    marker={"symbol": "circle-open", "size": 30, "color": "#e03131", "line": {"width": 3}},
                    name="failed the gate on accuracy",
                )
            )
    if graded and (base := graded[0]).round == 0:
        figure.add_trace(
            go.Scatter(
                x=[1.0],
                y=[100 * (base.ar.accuracy or 0.0)],
                mode="markers",
                marker={"symbol": "star", "size": 18, "color": "#212529"},
                name="base model, autoregressive",
            )
        )
    figure.update_xaxes(rangemode="tozero")
    lowest = min((100 * (e.ar.accuracy or 0.0) for e in graded), default=0.0)
    figure.update_yaxes(range=[max(0.0, lowest - 10), 101])  # ten points: less would make noise look like loss
    return Picture(
        "Speed gained, accuracy kept",
        "Further right is faster: tokens written by one pass of the model. Higher is better: right answers on "
        "held-out prompts, with their 95% interval. Numbers are rounds (0: the base); the star is ordinary decoding.",
        _labelled(figure, "tokens per forward pass", "right answers, %"),
    )


def _interval(evaluations: Sequence[Evaluation], mode: Mode) -> dict[str, object] | None:
    """Error bars of the accuracy: 95% confidence."""
    results = [e.mode(mode) for e in evaluations]
    if any(r.interval is None for r in results):
        return None
    up = [100 * (r.interval[1] - (r.accuracy or 0.0)) for r in results if r.interval]
    down = [100 * ((r.accuracy or 0.0) - r.interval[0]) for r in results if r.interval]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 4}


def settings(looks: Sequence[Look]) -> Picture:
    """Speed-up by block size and blocks in flight, for the base and the last model."""
    shown = [looks[0], looks[-1]] if len(looks) > 1 else list(looks)
    figure = make_subplots(
        cols=len(shown), subplot_titles=[model_name(look.round) for look in shown], shared_yaxes=True
    )
    for column, look in enumerate(shown, start=1):
        grid = [[look.speedup(n, k) for n in BLOCK_SIZES] for k in BLOCKS]
        figure.add_trace(
            go.Heatmap(
                z=grid,
                x=[str(n) for n in BLOCK_SIZES],
                y=[f"{k}" if k > 1 else "1 (Jacobi)" for k in BLOCKS],
                texttemplate="%{z:.2f}",
                textfont={"size": 16},
                coloraxis="coloraxis",
                hovertemplate="block size %{x}, blocks in flight %{y}: %{z:.2f} times<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="block size (tokens drafted at once)", row=1, col=column)
    figure.update_layout(
        coloraxis={"colorscale": "RdYlGn", "cmid": 1.0, "colorbar": {"title": "times<br>autoregressive"}}, height=360
    )
    figure.update_yaxes(title_text="blocks in flight, K", row=1, col=1)
    return Picture(
        "Which settings pay on this machine",
        "Tokens per second over ordinary decoding of the same model; below 1 the draft costs more than it gains. "
        "Measured time of a forward, measured acceptance.",
        figure,
    )


def acceptance(collected: Sequence[Collected]) -> Picture:
    """Share of blocks whose first p tokens are right after one pass, by p."""
    return _by_position(
        [(c.model, [float((c.accepted > p).mean()) for p in range(c.block_size)]) for c in collected],
        "How far into a block one pass already gets it right",
        "From a random guess, after a single pass: share of blocks whose tokens up to this position are all right. "
        "Two always are (one is known, any pass adds one); training lifts the rest.",
        "position in the block",
        "blocks right up to here, %",
    )


def accepted(evaluations: Sequence[Evaluation]) -> Picture:
    """Share of decode forwards that added at least so many tokens, model by model."""
    return _by_position(
        [(e.round, e.jacobi.acceptance) for e in evaluations],
        "What a forward pass adds while decoding",
        "Share of the forward passes on held-out prompts that wrote at least so many tokens. Ordinary decoding always "
        "writes one; the area under a line is the model's tokens per forward.",
        "tokens written by one forward pass",
        "forward passes, %",
    )


def _by_position(lines: Sequence[tuple[int, Sequence[float]]], title: str, text: str, x: str, y: str) -> Picture:
    """A line for each model: its share (0 to 1) at position 1, 2, …, in percent."""
    figure = go.Figure()
    for model, shares in lines:
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(shares) + 1)),
                y=[100 * share for share in shares],
                mode="lines+markers",
                name=model_name(model),
                line={"color": _colour(model), "width": 3},
            )
        )
    figure.update_yaxes(range=[0, 103])
    return Picture(title, text, _labelled(figure, x, y))


def throughput(rates: Sequence[Rate]) -> Picture:
    """Tokens per second while collecting and training, over the time of the run."""
    figure = go.Figure()
    for stage, colour in STAGE_COLOURS.items():
        for number in sorted({r.round for r in rates if r.stage == stage}):
            points = [r for r in rates if (r.stage, r.round) == (stage, number)]
            name = f"{stage} round {number}"
            figure.add_trace(
                go.Scatter(
                    x=[p.seconds / 60 for p in points],
                    y=[p.tokens_per_s for p in points],
                    mode="lines+markers" if len(points) < 5 else "lines",
                    line={"color": colour, "dash": ("solid", "dash", "dot")[number % 3]},
                    name=name,
                    hovertemplate=f"{name}, minute %{{x:.1f}}: %{{y:.0f}} tokens/s<extra></extra>",
                )
            )
    figure.update_yaxes(rangemode="tozero")
    return Picture(
        "Throughput over the run",
        "Tokens per second while responses and their trajectories are collected, and while the model trains on them; "
        "gaps are evaluation, export and starting up.",
        _labelled(figure, "minutes since the first figure", "tokens per second"),
    )


def _labelled(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def _colour(round_number: int) -> str:
    return COLOURS[round_number % len(COLOURS)]
