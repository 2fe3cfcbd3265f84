"""Figures of the benchmarks' page that other pages quote, kept equal to it.

A quoted figure stands behind a comment that names it, ``<!-- decode.ratio_speedup_vs_ar -->2.3``: the benchmark, the
key, and what it is to be multiplied with where that is not 1 (``*100``, ``*1e-6``). It keeps its number of decimals.
The words around it are for a person to read again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Figures = Mapping[str, Mapping[str, str]]
"""Values as the page writes them, by benchmark and key."""

_QUOTE = re.compile(r"(<!-- (\w+)\.([\w.]+)(?:\*([\de.-]+))? -->)(\d+(?:,\d{3})*(?:\.\d+)?)")


class UnknownFigureError(ValueError):
    """A page quotes a figure that no benchmark gives."""


def figures_of(page: str) -> dict[str, dict[str, str]]:
    """What the page of the benchmarks says."""
    found = {}
    for part in page.split("\n## ")[1:]:
        name, _, text = part.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
        found[name] = {key.strip("`"): value for key, value in rows}
    return found


def requoted(text: str, figures: Figures) -> tuple[str, list[str]]:
    """A page with the figures it quotes as they are now, and what had to be changed, in words.

    Quotes of a benchmark whose figures are not on the page yet stay as they are.

    Raises:
        UnknownFigureError: a quoted benchmark or key does not exist.
    """
    changes: list[str] = []

    def now(quote: re.Match[str]) -> str:
        comment, name, key, factor, written = quote.groups()
        if name not in figures or (figures[name] and key not in figures[name]):
            raise UnknownFigureError(f"there is no figure {name}.{key}")
        if not figures[name]:
            return quote[0]
        decimals = len(written.partition(".")[2])
        value = f"{float(figures[name][key]) * float(factor or 1):{',' if ',' in written else ''}.{decimals}f}"
        if value != written:
            changes.append(f"{name}.{key}: {written} is now {value}")
        return comment + value

    return _QUOTE.sub(now, text), changes


def quotes(text: str) -> Sequence[str]:
    """The figures a page quotes, as ``benchmark.key``."""
    return [f"{m[2]}.{m[3]}" for m in _QUOTE.finditer(text)]
