"""The dashboard in a real browser: the address people are given, the runs, the charts, the pictures, the registry.

Needs Chromium on the machine (`CHROMIUM` or on the path); skipped where there is none. With ``DASHBOARD_RUNS`` set to a
runs directory the screenshots for docs/images are taken of the run in it that ``DASHBOARD_CONFIG`` describes.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
from mlflow.tracking import MlflowClient
from playwright.sync_api import Browser, Page, expect, sync_playwright

from jf_cluster.config import Config, load_config
from jf_cluster.dashboard.registry import registered_name
from jf_cluster.dashboard.serving import landing_page
from jf_cluster.tracking import Tracker
from tests.dashboard.test_pictures import NAMES

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PATIENCE_MS = 30_000
DOCUMENTED = os.environ.get("DASHBOARD_RUNS")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (set CHROMIUM)")


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> Config:
    if DOCUMENTED:
        path = os.environ.get("DASHBOARD_CONFIG", ROOT / "configs" / "tiny.yaml")
        return load_config(path, [f"runs_dir={DOCUMENTED}"])
    found: tuple[Config, Tracker] = request.getfixturevalue("finished")
    return found[0]


@pytest.fixture(scope="module")
def server(config: Config) -> Iterator[str]:
    """`python -m jf_cluster mlflow` on a free port; gives the address it tells people to look at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = config.runs_dir / "browser.yaml"
    settings.write_text(config.to_yaml())
    command = [sys.executable, "-m", "jf_cluster", "mlflow", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--config", str(settings)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        told = [process.stdout.readline(), process.stdout.readline()]
        address = told[1].removeprefix("what every round did: ").strip()
        assert address == landing_page(config, f"http://127.0.0.1:{port}") and "overview.html" in address
        _wait_until_up(f"http://127.0.0.1:{port}/health", process)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=60)


def _wait_until_up(address: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the dashboard did not come up")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 860})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    # The assistant MLflow offers takes a quarter of the window.
    page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield page
    page.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return ROOT / "docs" / "images" if DOCUMENTED else tmp_path


def shoot(page: Page, path: Path) -> None:
    page.screenshot(path=path)
    assert 5_000 < path.stat().st_size < 200_000, "something to see, and small enough for docs"


def expect_chart(page: Page, metric: str) -> None:
    """MLflow draws only what is in sight, so the chart is searched for as a person would."""
    page.get_by_placeholder("Search metric charts").fill(metric)
    expect(page.get_by_role("heading", name=metric, exact=True)).to_be_visible()
    expect(page.locator(".js-plotly-plot .trace").first).to_be_attached()


def test_the_address_people_are_given_shows_what_every_round_did(server: str, page: Page, images: Path) -> None:
    page.goto(server)
    frame = page.frame_locator("iframe.mlflow-html-iframe")
    expect(frame.get_by_role("heading", name="what every round did")).to_be_visible()
    for name in NAMES:
        # Drawn by the library inside MLflow's own frame, not merely present as markup.
        expect(frame.locator(f"#{name} .main-svg").first).to_be_attached()
    expect(page.get_by_text("report.json")).to_be_visible()
    expect(page.get_by_text("config.yaml")).to_be_visible()
    shoot(page, images / "dashboard.png")


def test_hovering_over_a_picture_tells_figures(config: Config, page: Page, images: Path) -> None:
    page.goto((config.run_dir / "overview.html").as_uri())
    for name in NAMES:
        section = page.locator(f"#{name}")
        section.scroll_into_view_if_needed()
        expect(section.locator(".main-svg").first).to_be_visible()
        path = images / f"{name}.png"
        section.screenshot(path=path)
        assert 5_000 < path.stat().st_size < 200_000
    page.locator("#decoding-jacobi .nsewdrag").first.hover(position={"x": 40, "y": 40})
    expect(page.locator("#decoding-jacobi .hoverlayer")).to_contain_text("position in the response")


def test_the_runs_and_their_charts_are_found(config: Config, server: str, page: Page, images: Path) -> None:
    run = server.split("/artifacts/")[0]
    page.goto(f"{run}?workflowType=machine_learning")
    for child in ("round-001-collect", "round-001-train", "round-002-evaluate"):
        expect(page.get_by_role("link", name=child)).to_be_visible()
    page.goto(f"{run}/model-metrics?workflowType=machine_learning")
    expect_chart(page, "tpf_jacobi")
    client = MlflowClient(Tracker.open(config).uri)
    experiment = client.get_experiment_by_name(f"jacobi-forcing/{config.name}")
    assert experiment is not None
    (train,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'round-001-train'")
    page.goto(f"{run.rsplit('/', 1)[0]}/{train.info.run_id}/model-metrics?workflowType=machine_learning")
    for metric in ("learning_rate", "tokens_per_s", "loss"):
        expect_chart(page, metric)
    page.get_by_placeholder("Search metric charts").fill("")
    expect(page.locator(".js-plotly-plot").nth(2)).to_be_visible()
    shoot(page, images / "training.png")
    page.goto(f"{run.rsplit('/', 1)[0]}/{train.info.run_id}/system-metrics?workflowType=machine_learning")
    expect(page.get_by_text("cpu_utilization_percentage").first).to_be_visible()


def test_the_champion_is_found_in_the_registry(config: Config, server: str, page: Page, images: Path) -> None:
    page.goto(f"{server.split('/#/')[0]}/#/models/{registered_name(config)}")
    expect(page.get_by_text("champion").first).to_be_visible()
    expect(page.get_by_text("round-2").first).to_be_visible()
    shoot(page, images / "registry.png")
