"""What the pictures show is what the outputs say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jf_cluster.config import Config
from jf_cluster.dashboard.gathered import gather
from jf_cluster.dashboard.heatmaps import DECODING, POSITIONS, TRAJECTORY
from jf_cluster.dashboard.page import page, pictures
from jf_cluster.dashboard.showing import show
from jf_cluster.evaluate import looking
from jf_cluster.report import rows_of
from jf_cluster.tracking import Tracker
from tests.dashboard.conftest import BLOCK
from trajectory_store import Trajectory

NAMES = [
    *("speed-and-accuracy", "trajectories", "iterations", "acceptance", "accepted"),
    *("decoding-jacobi", "decoding-multiblock", "settings", "throughput"),
]


def test_every_picture_has_words_axes_and_the_figures(finished: tuple[Config, Tracker]) -> None:
    config, tracker = finished
    drawn = pictures(gather(config, tracker, 2))
    assert list(drawn) == NAMES
    for picture in drawn.values():
        assert picture.title and len(picture.subtitle) > 60
        axes = [axis for axis in picture.figure.layout if axis.startswith(("xaxis", "yaxis"))]
        assert axes and picture.figure.layout.xaxis.title.text and picture.figure.layout.yaxis.title.text
    speed = drawn["speed-and-accuracy"].figure.data
    np.testing.assert_allclose([speed[0].x, speed[1].x], [(1.1, 2.1, 3.1), (1.2, 2.2, 3.2)])
    np.testing.assert_allclose(speed[0].y, (90, 89, 88))
    assert speed[-1].name == "base model, autoregressive" and speed[-1].x == (1.0,)
    base, last = drawn["iterations"].figure.data[0], drawn["iterations"].figure.data[-1]
    assert base.y[BLOCK - 1] == 100 and last.y[2] == 100, "a token a pass before, three after: 8 and 3 passes"
    first_pass = drawn["acceptance"].figure.data
    assert [sum(share == 100 for share in line.y) for line in first_pass] == [1, 2, 3]
    for line, tpf in zip(drawn["accepted"].figure.data, (1.1, 2.1, 3.1), strict=True):
        assert line.x[0] == 1 and line.y[0] == 100 and np.isclose(sum(line.y), 100 * tpf)
    assert {trace.name for trace in drawn["throughput"].figure.data} == {
        *("collect round 1", "collect round 2", "collect round 3", "train round 1", "train round 2")
    }
    np.testing.assert_allclose(drawn["settings"].figure.data[0].z[0], [0.802, 1.602, 3.202, 6.402], rtol=0.01)


def test_the_heat_maps_mark_what_happened(finished: tuple[Config, Tracker]) -> None:
    config, tracker = finished
    drawn = pictures(gather(config, tracker, 2))
    wrong, _, accepted = range(len(TRAJECTORY))
    base = np.array(drawn["trajectories"].figure.data[0].z)
    assert base.shape == (BLOCK + 1, 4 * BLOCK)
    expected = np.where(np.arange(BLOCK) < np.arange(BLOCK + 1)[:, None], accepted, wrong)
    np.testing.assert_array_equal(base, np.tile(expected, 4))
    kinds = list(DECODING)
    last = np.array(drawn["decoding-multiblock"].figure.data[1].z)  # three tokens a forward, two of them recycled
    row = [kinds[int(k)] for k in last[1][~np.isnan(last[1])]]
    assert row == [
        *["written by an earlier forward"] * 4,
        *["confirmed, from a recycled n-gram"] * 2,
        "the model's own next token",
        *["drafted, not confirmed"] * (BLOCK - 3),
        *["drafted behind unverified text (second block)"] * 4,
    ]


def test_a_block_longer_than_the_picture_is_shown_up_to_its_edge(finished: tuple[Config, Tracker]) -> None:
    found = gather(*finished, 2)
    (first, *_) = found.collected
    row = first.example
    long = Trajectory(
        row.prompt_id, row.prompt, np.tile(row.response, 4), True, np.array([1], np.int32), np.zeros(1, np.int32),
        np.full(4 * len(row.response), 5, np.int32),
    )  # fmt: skip
    assert len(long.response) > POSITIONS
    drawn = pictures(replace(found, collected=(replace(first, block_size=2 * POSITIONS, example=long),)))
    assert np.array(drawn["trajectories"].figure.data[0].z).shape == (2, POSITIONS)


def test_the_page_is_complete_in_itself_and_holds_its_library_once(finished: tuple[Config, Tracker]) -> None:
    config, tracker = finished
    html = page(gather(config, tracker, 2))
    assert html.count("<section id=") == len(NAMES) and html.count("<script") == len(NAMES) + 1
    assert "src=" not in html.split("</script>")[-1] and 'src="http' not in html
    assert len(html) < 7_000_000, "MLflow shows it inline"


def test_what_is_missing_is_left_out(tmp_path) -> None:
    config = Config.model_validate({"name": "new", "runs_dir": tmp_path})
    tracker = Tracker.open(config)
    assert pictures(gather(config, tracker, 0)) == {}
    assert show(config, tracker) == [] and (config.run_dir / "overview.html").is_file()


def test_a_model_put_aside_and_a_damaged_look_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config.model_validate({"name": "aside", "runs_dir": tmp_path})
    tracker = Tracker.open(config)
    for name in ("round-002", "round-003.bak", "round-004-old", ".round-005"):
        (config.run_dir / "models" / name).mkdir(parents=True)
    assert config.newest_model() == 2 and rows_of(config) == []
    damaged = looking._path(config, 2)
    damaged.parent.mkdir()
    damaged.write_text("")
    assert show(config, tracker) == [] and f"{damaged} cannot be read" in caplog.text
