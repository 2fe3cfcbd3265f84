"""A second Ray node on this machine: a raylet with a scratch directory of its own, and its sudden end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# `ray start` joins no cluster that is confined to loopback, as all are here; what it calls does.
_NODE = """
import signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams

parameters = RayParams(
    gcs_address=sys.argv[1], temp_dir=sys.argv[2], node_ip_address="127.0.0.1", num_cpus=1,
    object_store_memory=100 * 2**20, min_worker_port=0, max_worker_port=0, node_manager_port=0,
    include_log_monitor=False,
)
Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
signal.pause()
"""


@dataclass(frozen=True)
class Node:
    """A node that joined, by Ray's id, and the process it is started and ended with."""

    node_id: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """What a power cut does: no process of the node says a last word."""
        leader = psutil.Process(self.process.pid)
        for process in [*leader.children(recursive=True), leader]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def second_node() -> Iterator[Node]:
    """Join a node of one core to the cluster this process is connected to."""
    before = _alive()
    scratch = Path(tempfile.mkdtemp(prefix="jf"))  # short: sockets lie in it
    with (scratch / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _NODE, ray.get_runtime_context().gcs_address, str(scratch)],
            env=os.environ | {"RAY_TMPDIR": str(scratch), "TMPDIR": str(scratch)},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        while not (joined := _alive() - before):
            assert process.poll() is None, (scratch / "said").read_text()
            time.sleep(0.2)
        yield Node(joined.pop(), process)
    finally:
        if process.poll() is None:
            Node("", process).kill()
        shutil.rmtree(scratch, ignore_errors=True)


class _Holder:
    def ready(self) -> None:
        pass


@contextmanager
def one_core_left_here() -> Iterator[ray.actor.ActorHandle]:
    """Hold all cores of this node but one; killing what is given lets them go."""
    here = ray.get_runtime_context().get_node_id()
    cores = next(int(node["Resources"]["CPU"]) for node in ray.nodes() if node["NodeID"] == here)
    options = {"num_cpus": cores - 1, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    holder = ray.remote(_Holder).options(**options).remote()
    ray.get(holder.ready.remote())
    try:
        yield holder
    finally:
        ray.kill(holder)
