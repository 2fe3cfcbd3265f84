"""What a cluster that is joined has to have, how long it is waited for, and who else can reach what listens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from jf_cluster import cluster
from jf_cluster.cluster import ClusterError, Head, connected
from jf_cluster.config import Config
from jf_cluster.listening import is_loopback
from jf_cluster.stopping import Terminated

CONFIG = Config.model_validate({"collect": {"workers": 4}, "train": {"gpus_per_worker": 1}})
"""Needs 4 CPUs and 2 GPUs."""


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Have the cluster consist of what is given, more of it at every look; the times slept come back."""

    def faked(*resources: dict[str, float]) -> list[float]:
        slept: list[float] = []
        monkeypatch.setattr(cluster, "join_or_start", lambda *_: None)
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources[min(len(slept), len(resources) - 1)])
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(cluster.time, "monotonic", lambda: sum(slept))
        monkeypatch.setattr(cluster.time, "sleep", slept.append)
        return slept

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    return faked


ONE = {"CPU": 2.0, "GPU": 1.0}
BOTH = {"CPU": 4.0, "GPU": 2.0}


def test_nodes_that_are_late_are_waited_for(has: Callable[..., list[float]], caplog: pytest.LogCaptureFixture) -> None:
    slept = has({}, ONE, ONE, BOTH)
    with connected(CONFIG):
        assert len(slept) == 3
    (warning,) = caplog.messages
    assert "4 CPUs at once and the Ray cluster has 0; 2 GPUs" in warning and "up to 15 minutes" in warning


def test_a_cluster_that_stays_too_small_is_an_error(
    has: Callable[..., list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    slept = has({}, {"CPU": 4.0, "GPU": 1.0})
    needs = r"needs 2 GPUs at once and the Ray cluster has 1: lower collect\.workers, train\.workers or gpus_per_worker"
    with pytest.raises(ClusterError, match=needs), connected(CONFIG):
        pytest.fail("began")
    assert cluster.NODES_WITHIN_S <= sum(slept) < cluster.NODES_WITHIN_S + 2 * cluster.POLL_S
    assert len(caplog.messages) == 1


def test_what_cannot_grow_is_not_waited_for(
    has: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slept = has(ONE)

    def refused(config: Config = CONFIG, **options: float) -> None:
        with pytest.raises(ClusterError, match="4 CPUs at once"), connected(config, **options):
            pytest.fail("began")
        assert slept == []

    refused(nodes_within_s=0.0)
    head = Head(os.getpid(), "127.0.0.1:6379", "http://127.0.0.1:8265")
    monkeypatch.setattr(cluster, "running_head", lambda _: head)
    monkeypatch.setenv("RAY_ADDRESS", head.address)  # as in a job of `make cluster`
    refused()
    monkeypatch.delenv("RAY_ADDRESS")
    refused()
    monkeypatch.setattr(cluster, "running_head", lambda _: None)  # a Ray of the run's own
    refused()


def test_sigterm_ends_the_wait(has: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    has(ONE)
    monkeypatch.setattr(cluster, "raise_if_asked", _ask)
    with pytest.raises(Terminated), connected(CONFIG):
        pytest.fail("began")


def _ask() -> None:
    raise Terminated


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "[2001:db8::1]", "", "node-1"])
def test_wider_than_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_ray_without_a_token_is_warned_of_where_others_reach_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    cluster._warn_if_open("10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster._warn_if_open("127.0.0.1:6379")
    assert caplog.messages == []
    cluster._warn_if_open("10.0.0.1:6379")
    (warning,) = caplog.messages
    assert "Ray listens on 10.0.0.1 without authentication" in warning and "RAY_AUTH_MODE=token" in warning


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ClusterError, match=r"^Ray does not start on this machine: The current node timed out"):
        cluster.join_or_start(None, 2)


def test_a_ray_that_is_late_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [Exception("The current node timed out during startup."), ValueError("no memory")]

    def fails(**_: object) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(ClusterError, match="Ray does not start on this machine: no memory"):
        cluster.join_or_start(None, 2)
    assert failures == [] and "once more" in caplog.text


@pytest.mark.parametrize(("says", "starts"), [("The current node timed out during startup.", 3), ("no memory", 1)])
def test_a_head_that_is_late_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, starts: int
) -> None:
    program = tmp_path / "ray"
    program.write_text(f'#!/bin/sh\n[ $1 = start ] && echo x >> {tmp_path}/starts && echo "{says}"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(cluster.sys, "executable", str(tmp_path / "python"))
    [port] = cluster._free_ports(1)
    with pytest.raises(ClusterError, match=rf"the Ray head did not start; its last words are in .*\n{says}"):
        cluster.start_head(tmp_path, port=port)
    assert (tmp_path / "starts").read_text().split() == ["x"] * starts
    assert cluster.running_head(tmp_path) is None
