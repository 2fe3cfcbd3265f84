"""Ray: joining a cluster or starting a local one, and the head that `make cluster` starts and stops.

A run joins the cluster in ``RAY_ADDRESS``, else the one `make cluster` started from here, else it starts a Ray of its
own that ends with it. Everything binds to 127.0.0.1 (jf_cluster/ray_environment.py). The head is a process of its own
whose id is remembered, so stopping it never touches another Ray on the machine, as ``ray stop`` would.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from jf_cluster.config import Config
from jf_cluster.listening import warn_if_open
from jf_cluster.ray_environment import DASHBOARD_PORT, HOME_VARIABLE
from jf_cluster.stopping import raise_if_asked
from jf_cluster.whole_files import write_whole

logger = logging.getLogger(__name__)

LATE = "Ray has not started in the time it gives itself, half a minute: once more"
LOCAL_STARTS = 3
"""Ray's half minute for a start is fixed; a machine with much else to do, or with a cold disk, may not keep to it."""
NODES_WITHIN_S = 900.0
"""How long a cluster that was joined is given to bring the nodes a run needs: they start beside the driver."""
POLL_S = 2.0
OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Trajectories go straight from actors to the store; Ray's object store only carries batches of prompts."""


class ClusterError(RuntimeError):
    """Ray cannot be reached, started or does not have what the run asks for; the message says what to do."""


@dataclass(frozen=True)
class Head:
    """The head that `make cluster` started: its process, its GCS address and its dashboard."""

    pid: int
    address: str
    dashboard: str

    def alive(self) -> bool:
        """Whether that very process still runs (its id may have been given to another one since)."""
        with contextlib.suppress(psutil.Error):
            return f"--port={_port_of(self.address)}" in psutil.Process(self.pid).cmdline()
        return False


def _state_dir(runs_dir: Path) -> Path:
    return runs_dir / ".cluster"


def running_head(runs_dir: Path) -> Head | None:
    """Give the head started from this ``runs_dir``, or None when none runs."""
    path = _state_dir(runs_dir) / "head.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    head = Head(found["pid"], found["address"], found["dashboard"])
    return head if head.alive() else None


def joined_cluster(config: Config) -> str | None:
    """Give the address of the Ray cluster a run joins, or None where it starts a Ray of its own."""
    head = running_head(config.runs_dir)
    return os.environ.get("RAY_ADDRESS") or (head.address if head else None)


def join_or_start(address: str | None, cpus: float) -> None:
    """Join the Ray cluster at ``address``, or start a local Ray that has room for ``cpus``.

    Raises:
        ClusterError: no cluster answers at ``address``, or a local Ray does not start.
    """
    # What workers print stays in Ray's log files: it would tear the progress bars; failures come as exceptions.
    quietly: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    # Ray puts a handler of its own in place, which ends the process on the spot.
    on_terminate = signal.getsignal(signal.SIGTERM)
    if address:
        logger.info("joining the Ray cluster at %s", address)
        try:
            ray.init(address=address, **quietly)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
    else:
        logger.info("starting a local Ray")
        _start_local(cpus, quietly)
    signal.signal(signal.SIGTERM, on_terminate)
    _warn_if_open(ray.get_runtime_context().gcs_address)


def _start_local(cpus: float, options: dict[str, Any]) -> None:
    for attempt in range(1, LOCAL_STARTS + 1):
        try:
            ray.init(
                # Without it Ray joins whatever cluster was started last on this machine, whoever started it.
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **options,
            )
            return
        except Exception as error:  # a bare one where Ray's processes do not answer in time
            if attempt == LOCAL_STARTS or "timed out" not in str(error):
                raise ClusterError(f"Ray does not start on this machine: {error}") from error
            logger.warning(LATE)


def _warn_if_open(gcs_address: str) -> None:
    """Warn where other machines reach a Ray that asks for no token: they can run anything in it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        warn_if_open("Ray", gcs_address.rpartition(":")[0], "set RAY_AUTH_MODE=token wherever Ray is started")


@contextlib.contextmanager
def connected(config: Config, *, nodes_within_s: float = NODES_WITHIN_S) -> Iterator[None]:
    """Join or start Ray for as long as the context lasts, with what ``config`` needs to place its workers.

    A cluster of others' making is given time to bring its nodes; the head of `make cluster` has all it will ever have.

    Raises:
        ClusterError: the cluster cannot be reached or can never place the workers.
    """
    needed = {"CPU": config.needs("cpus_per_worker"), "GPU": config.needs("gpus_per_worker")}
    address, head = joined_cluster(config), running_head(config.runs_dir)
    join_or_start(address, needed["CPU"])
    try:
        _require(needed, 0.0 if address is None or (head and address == head.address) else nodes_within_s)
        yield
    finally:
        ray.shutdown()


def _require(needed: dict[str, float], within_s: float) -> None:
    """Wait until the cluster has what is ``needed`` at once, by name of the resource.

    Raises:
        ClusterError: it has not got it after ``within_s`` seconds.
        jf_cluster.stopping.Terminated: SIGTERM came.
    """
    deadline, warned = time.monotonic() + within_s, False
    while True:
        there = ray.cluster_resources()
        lacking = [name for name, count in needed.items() if there.get(name, 0.0) < count]
        if not lacking:
            return
        has = "; ".join(f"{needed[n]:g} {n}s at once and the Ray cluster has {there.get(n, 0.0):g}" for n in lacking)
        if time.monotonic() >= deadline:
            settings = " or ".join(f"{name.lower()}s_per_worker" for name in lacking)
            raise ClusterError(
                f"the configuration needs {has}: lower collect.workers, train.workers or {settings}, or add nodes"
            )
        if not warned:
            warned = True
            logger.warning(
                "the configuration needs %s: waiting up to %.0f minutes for the other nodes", has, within_s / 60
            )
        time.sleep(POLL_S)
        raise_if_asked()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def start_head(runs_dir: Path, *, timeout_s: float = 300.0, port: int = DASHBOARD_PORT) -> Head:
    """Start a Ray head on 127.0.0.1 in the current directory and wait until its job server answers.

    Jobs are run in the current directory, with this Python's programs first on the path. A head that already runs is
    returned as it is.

    Raises:
        ClusterError: the dashboard's port is taken, or the head ended or did not answer in time.
    """
    if (head := running_head(runs_dir)) is not None:
        return head
    if _listening(port):
        raise ClusterError(f"port {port} of the dashboard is taken (another Ray runs?): stop what listens there")
    _state_dir(runs_dir).mkdir(parents=True, exist_ok=True)
    log = _state_dir(runs_dir) / "head.log"
    for attempt in itertools.count(1):
        head, process = _launch_head(runs_dir, log, timeout_s, port)
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline:
            if _jobs_answer(head):
                return head
            time.sleep(0.5)
        stop_head(runs_dir)
        said = log.read_text()
        if attempt == LOCAL_STARTS or "timed out" not in said:
            raise ClusterError(f"the Ray head did not start; its last words are in {log}:\n{said[-2000:]}")
        logger.warning(LATE)


def _launch_head(runs_dir: Path, log: Path, timeout_s: float, port: int) -> tuple[Head, subprocess.Popen[bytes]]:
    """Start the process of a head and remember it in ``runs_dir``."""
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        HOME_VARIABLE: str(Path.cwd()),
        # A machine with much else to do needs longer than Ray's minute; whoever joins is told of a dead head sooner.
        "RAY_gcs_server_request_timeout_seconds": f"{timeout_s:.0f}",
    }
    ray_program = str(Path(programs) / "ray")
    # Creates the token of this user where there is none yet; its output is the token itself, so it is not shown.
    subprocess.run([ray_program, "get-auth-token", "--generate"], env=environment, capture_output=True, check=False)
    gcs_port, agent_port = _free_ports(2)
    address = f"127.0.0.1:{gcs_port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(ray_program, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs_port}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
                # Its default is one fixed port: beside another Ray of this machine the agent that runs jobs has none.
                f"--dashboard-agent-listen-port={agent_port}",
                f"--object-store-memory={OBJECT_STORE_BYTES}",
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = Head(process.pid, address, f"http://127.0.0.1:{port}")
    write_whole(_state_dir(runs_dir) / "head.json", json.dumps(asdict(head)))
    return head, process


def _jobs_answer(head: Head, timeout_s: float = 60.0) -> bool:
    """Whether the job server takes jobs, told by a job that does nothing.

    The dashboard listens, and lists jobs, before an agent is there to run them; until then a job is refused.
    """
    if not _listening(_port_of(head.dashboard)):
        return False
    from ray.job_submission import JobSubmissionClient  # needs the dashboard's extra packages, and time to import

    try:
        client = JobSubmissionClient(head.dashboard)
        probe = client.submit_job(entrypoint="true")
        deadline = time.monotonic() + timeout_s
        while not client.get_job_status(probe).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
        client.delete_job(probe)
    except (OSError, RuntimeError):  # the client's own ConnectionError is an OSError
        return False
    return True


def stop_head(runs_dir: Path, *, timeout_s: float = 30.0) -> bool:
    """Stop the head started from ``runs_dir`` with all its processes; say whether there was one."""
    head = running_head(runs_dir)
    if head is not None:
        leader = psutil.Process(head.pid)
        family = [leader, *leader.children(recursive=True)]
        leader.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=timeout_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=timeout_s)
    (_state_dir(runs_dir) / "head.json").unlink(missing_ok=True)
    return head is not None
