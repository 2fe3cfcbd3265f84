"""A picture and the words that explain it."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go


@dataclass(frozen=True)
class Picture:
    """What is seen, what one sees in it, and the figure."""

    title: str
    subtitle: str
    figure: go.Figure


def model_name(round_number: int) -> str:
    """A model's name for people."""
    return "Base model" if round_number == 0 else f"After round {round_number}"
