"""The page of the benchmarks: a section for each, from its docstring and its figures, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import BENCHMARKS, about, page, publish
from bench.measure import report
from bench.quotes import UnknownFigureError, figures_of, quotes, requoted

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def test_every_benchmark_has_its_section_on_the_page() -> None:
    """What it says of itself is what the benchmark says; when this fails: python -m bench --page docs/benchmarks.md."""
    written = PAGE.read_text()
    assert page({}, written) == written
    assert list(figures_of(written)) == BENCHMARKS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_tells_its_command_first(name: str) -> None:
    assert about(name).startswith(f"`python -m bench.{name}`: ")


def test_only_what_was_run_is_made_anew() -> None:
    first = page({"decode": {"ratio": 1.5, "machine": "a"}, "loss": {"share": 0.123456, "machine": "a"}})
    assert figures_of(first)["decode"] == {"ratio": "1.5"} and figures_of(first)["scale"] == {}
    assert first.count("*Its figures are not on this page yet.*") == len(BENCHMARKS) - 2
    second = page({"decode": {"ratio": 2.0, "machine": "b"}}, first)
    assert figures_of(second) == figures_of(first) | {"decode": {"ratio": "2"}}
    assert "*machine b*" in second and "*machine a*" in second


def test_a_report_names_the_processor(tmp_path: Path) -> None:
    report("nothing", {}, tmp_path / "figures.json")
    machine = (tmp_path / "figures.json").read_text().partition('"machine": "')[2].partition('"')[0]
    name, cores = machine.rsplit(", ", 1)
    lines = Path("/proc/cpuinfo").read_text()
    assert (name in lines or "model name" not in lines) and cores.endswith(" cores") and machine != "x86_64"


def test_the_figures_that_pages_quote_are_those_of_the_benchmarks() -> None:
    """When this fails: python -m bench NAME --page docs/benchmarks.md writes both; or change what is listed by hand."""
    figures = figures_of(PAGE.read_text())
    quoted = {path.name: requoted(path.read_text(), figures)[1] for path in PAGE.parent.glob("*.md")}
    assert {name: changes for name, changes in quoted.items() if changes} == {}
    assert len(quotes((PAGE.parent / "decoding.md").read_text())) > 20


def test_a_quote_follows_the_page(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text(
        "At <!-- decode.rate*1e-3 -->1,234.5 and <!-- loss.share*100 -->12%, <!-- scale.any -->7; 1.5 alone."
    )
    publish(tmp_path / "page.md", {"decode": {"rate": 2345678.0}, "loss": {"share": 0.0876}})
    assert other.read_text() == (
        "At <!-- decode.rate*1e-3 -->2,346.0 and <!-- loss.share*100 -->9%, <!-- scale.any -->7; 1.5 alone."
    )
    figures = figures_of((tmp_path / "page.md").read_text())
    assert requoted("<!-- loss.share -->0.1.", figures) == (
        "<!-- loss.share -->0.1.", []
    ) and requoted("<!-- loss.share -->0.2.", figures)[1] == ["loss.share: 0.2 is now 0.1"]  # fmt: skip
    for unknown in ("loss.shares", "lost.share"):
        with pytest.raises(UnknownFigureError, match=unknown):
            requoted(f"<!-- {unknown} -->1", figures)
