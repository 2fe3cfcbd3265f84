"""SIGTERM: at once where nothing is lost by it, at the next safe point where something is, and its exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import typer

from jf_cluster import pipeline
from jf_cluster.collect.collecting import Undertaking
from jf_cluster.command import clear_errors
from jf_cluster.config import Config
from jf_cluster.pipeline import collect_and_train
from jf_cluster.stopping import Terminated, listen, raise_if_asked, stop_at_once, stops_through
from jf_cluster.train import Arriving, stop_request

Stage = Callable[[Any], None]


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, stop_at_once)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_request_is_left_and_honoured_at_the_end(tmp_path: Path) -> None:
    request, done = tmp_path / "stop", False
    request.touch()
    with pytest.raises(Terminated), stops_through(request):
        assert not request.exists(), "an earlier process's request is not this one's"
        signal.raise_signal(signal.SIGTERM)
        assert request.exists()
        done = True
    assert done
    assert signal.getsignal(signal.SIGTERM) is stop_at_once
    with stops_through(request):
        pass


def test_a_second_request_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(Terminated), stops_through(tmp_path / "stop"):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")


def no_room(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_request_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Terminated), stops_through(tmp_path / "stop"):
        monkeypatch.setattr(Path, "touch", no_room)
        signal.raise_signal(signal.SIGTERM)
        assert (tmp_path / "stop").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


def test_a_request_that_cannot_be_left_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Terminated), stops_through(tmp_path / "stop"):
        monkeypatch.setattr(Path, "rename", no_room)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")


class TestPipelined:
    """Collecting and training at once, both made up here."""

    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
        undertaking = SimpleNamespace(prompts=SimpleNamespace(ids=list), provenance=None)
        monkeypatch.setattr(Undertaking, "of", lambda *_: undertaking)
        monkeypatch.setattr(pipeline, "ASK_EVERY_S", 0.05)
        config = Config.model_validate({"name": "run", "runs_dir": tmp_path})
        (config.run_dir / "training").mkdir(parents=True)
        return config

    @staticmethod
    def carry_out(config: Config, monkeypatch: pytest.MonkeyPatch, collect: Stage, train: Stage) -> None:
        monkeypatch.setattr(pipeline, "collect_round", lambda *_, **given: collect(given["stop"]))
        monkeypatch.setattr(pipeline, "train_round", lambda *given: train(given[-1]))
        collect_and_train(config, 1, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]

    def test_sigterm_is_seen_when_training_has_come_to_its_end_first(
        self, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped = threading.Event()

        def collect(stop: threading.Event) -> None:
            if stop.wait(20):
                stopped.set()
                raise KeyboardInterrupt

        def train(arriving: Arriving) -> None:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with stops_through(stop_request(config, 1)):
                arriving.sealed()

        with pytest.raises(Terminated):
            self.carry_out(config, monkeypatch, collect, train)
        assert stopped.is_set(), "collecting ends too"

    def test_ranks_are_asked_until_they_can_be(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        request, asked, rename = stop_request(config, 1), threading.Event(), Path.rename

        def refused_once(path: Path, target: Path) -> Path:
            if not asked.is_set():
                asked.set()
                no_room()
            return rename(path, target)

        def train(_: Arriving) -> None:
            with stops_through(request):
                deadline = time.monotonic() + 20
                while not request.exists():
                    assert time.monotonic() < deadline, "the ranks wait for ever"
                    time.sleep(0.01)

        monkeypatch.setattr(Path, "rename", refused_once)
        with pytest.raises(OSError, match="No space left"):
            self.carry_out(config, monkeypatch, no_room, train)
        assert asked.is_set()


def test_a_failure_is_not_hidden_by_the_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), stops_through(tmp_path / "stop"):
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("broken")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_a_destructor_swallowed_is_not_lost() -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    listen()
    raise_if_asked()
    Collected()  # Python prints what a destructor raises, and goes on
    with pytest.raises(Terminated):
        raise_if_asked()
    listen()
    raise_if_asked()


SECOND = """
import signal, sys
from jf_cluster.stopping import Terminated, listen

def second(frame, event, argument):
    global left
    left -= 1
    if left == 0:
        signal.raise_signal(signal.SIGTERM)
    return second

listen()
for place in range(1, 40):
    left = place
    sys.settrace(second)
    try:
        signal.raise_signal(signal.SIGTERM)
        sys.exit("went on")
    except Terminated:
        sys.settrace(None)
"""


def test_a_second_request_may_come_at_any_line_of_the_first_ones_handler() -> None:
    """A lock taken there would be waited for for ever."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SECOND], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_ctrl_c_does_is_as_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stops_through(tmp_path / "stop"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray Train puts its own in place
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes(number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us behind it
    with pytest.raises(typer.Exit) as left, clear_errors():
        signal.raise_signal(number)
    signal.signal(signal.SIGINT, before)
    assert left.value.exit_code == code
    assert "the same command carries on" in capsys.readouterr().err
