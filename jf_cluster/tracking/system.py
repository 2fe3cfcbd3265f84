"""Load of the machines while a stage runs: processor, memory, disk, network and GPUs of every node of the cluster.

MLflow's own monitors take the samples, under the names its "System metrics" page shows. One small actor on every other
node samples there; the driver asks them all and is the only one that writes.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jf_cluster.tracking.stage_run import StageRun

logger = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0
ANSWER_WITHIN_S = 5.0
"""A node that is slower than this is left out of a sample."""


class Probe:
    """Samples the machine it lives on."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError) as error:  # no nvidia-ml-py, or no GPU
            logger.debug("no GPU metrics: %s", error)

    def sample(self) -> dict[str, float]:
        """Figures of this moment; the first one of the processor's load is 0."""
        figures: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return figures


@contextmanager
def system_metrics(stage: StageRun) -> Iterator[None]:
    """Record every node's load in the stage's run until the block ends, from a thread of its own."""
    run = StageRun.attach(stage.uri, stage.run_id, stage.journal.with_suffix(".system.jsonl"), quiet=True)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, stop), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(run: StageRun, stop: threading.Event) -> None:
    own = Probe()
    own.sample()  # the processor's load is counted from the sample before
    others: dict[str, Any] = {}
    step = max(run.steps_of("system/cpu_utilization_percentage"), default=-1) + 1
    ended = False
    while not ended:
        ended = stop.wait(SAMPLE_EVERY_S)
        others |= probes({name: node for name, node in other_nodes().items() if name not in others})
        figures = {f"system/{name}": value for name, value in own.sample().items()}
        for node, sample in samples(others).items():
            figures |= {f"system/{node}/{name}": value for name, value in sample.items()}
        run.metrics(figures, step)
        step += 1
    run.flush()


def other_nodes() -> dict[str, str]:
    """Ray's id of every living node but this one, by a name for people; none where Ray is not in use."""
    import ray

    if not ray.is_initialized():
        return {}
    here = ray.get_runtime_context().get_node_id()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    names = [n["NodeManagerHostname"] for n in nodes]
    return {
        name if names.count(name) == 1 and name != socket.gethostname() else f"{name}-{n['NodeID'][:6]}": n["NodeID"]
        for name, n in zip(names, nodes, strict=True)
    }


def probes(nodes: Mapping[str, str]) -> dict[str, Any]:
    """A probe on each node; they end when nobody holds them any more."""
    if not nodes:
        return {}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(Probe)
    return {
        name: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for name, node in nodes.items()
    }


def samples(actors: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the probes that answer in time say; a node that is gone says nothing."""
    if not actors:
        return {}
    import ray

    asked = {actor.sample.remote(): name for name, actor in actors.items()}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_WITHIN_S)
    found = {}
    for answer in answered:
        try:
            found[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError as error:
            logger.debug("no system metrics of %s: %s", asked[answer], error)
    return found
