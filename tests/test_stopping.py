"""SIGTERM: at once where nothing is lost by it, at the next safe point where something is, and its exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from jf_cluster.command import clear_errors
from jf_cluster.stopping import Terminated, listen, raise_if_asked, stop_at_once, stops_through


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
