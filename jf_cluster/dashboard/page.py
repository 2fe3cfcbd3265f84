"""The overview: one HTML page with all pictures, interactive and complete in itself, as MLflow shows it."""

from __future__ import annotations

import plotly.io
from jinja2 import Environment
from plotly.offline import get_plotlyjs

from jf_cluster.dashboard import charts, heatmaps
from jf_cluster.dashboard.gathered import Gathered
from jf_cluster.dashboard.picture import Picture

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}: overview</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 24px auto; max-width: 1180px; padding: 0 16px; color: #212529; }
table { border-collapse: collapse; margin: 12px 0 24px; }
th, td { padding: 4px 14px; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #dee2e6; font-weight: 600; } td { border-bottom: 1px solid #e9ecef; }
section { margin: 40px 0; } h2 { margin-bottom: 4px; } section p { margin: 0 0 8px; color: #495057; }
</style>
<script>{{ library }}</script></head><body>
<h1>{{ name }}: what every round did</h1>
<p>Jacobi Forcing teaches a language model to write several tokens in one pass. Every round, the newest model's own
attempts at repairing guessed text are collected, and the model is trained to reach the result in fewer passes. Hover
over a picture for figures, drag to enlarge.</p>
<table><tr><th>model</th><th>tokens per forward</th><th>tokens per second</th><th>autoregressive</th>
<th>speed-up</th><th>right answers</th><th>gate</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for name, picture, drawn in pictures %}<section id="{{ name }}"><h2>{{ picture.title }}</h2>
<p>{{ picture.subtitle }}</p>{{ drawn }}</section>
{% endfor %}</body></html>
"""


def pictures(found: Gathered) -> dict[str, Picture]:
    """All pictures there is something to draw for, by name, in the order of the page."""
    drawn = {}
    if found.evaluations and found.evaluations[0].ar.accuracy is not None:
        drawn["speed-and-accuracy"] = charts.speed_and_accuracy(found.evaluations)
    if found.collected:
        drawn["trajectories"] = heatmaps.trajectories(found.collected)
        drawn["iterations"] = charts.iterations(found.collected)
        drawn["acceptance"] = charts.acceptance(found.collected)
    if any(e.jacobi.acceptance for e in found.evaluations):
        drawn["accepted"] = charts.accepted(found.evaluations)
    if found.looks:
        drawn["decoding-jacobi"] = heatmaps.decodings(found.looks, "jacobi")
        drawn["decoding-multiblock"] = heatmaps.decodings(found.looks, "multiblock")
        drawn["settings"] = charts.settings(found.looks)
    if found.rates:
        drawn["throughput"] = charts.throughput(found.rates)
    return drawn


def page(found: Gathered) -> str:
    """The page as HTML; the drawing library is in it once, so it needs no network."""
    rows = [
        (
            "base" if e.round == 0 else f"round {e.round}",
            f"{e.jacobi.tpf:.2f}",
            f"{e.jacobi.tps:.0f}",
            f"{e.strongest_ar_tps:.0f}",
            f"{e.speedup('jacobi'):.2f}",
            "not graded" if e.ar.accuracy is None else f"{100 * e.ar.accuracy:.1f}%",
            "passed" if e.passed else "failed",
        )
        for e in found.evaluations
    ]
    drawn = [(name, picture, _drawn(picture)) for name, picture in pictures(found).items()]
    template = Environment(autoescape=False).from_string(_PAGE)  # names are plain by configuration; the rest is ours
    return template.render(name=found.name, rows=rows, pictures=drawn, library=get_plotlyjs())


def _drawn(picture: Picture) -> str:
    picture.figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 40})
    config = {"displaylogo": False, "responsive": True}
    return str(plotly.io.to_html(picture.figure, full_html=False, include_plotlyjs=False, config=config))
