"""What there is to run on: this machine, a Ray cluster, or machines that are only thought of."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import psutil
import ray
from ray.exceptions import GetTimeoutError

from jf_cluster.config import ConfigError

logger = logging.getLogger(__name__)

GIB = 1 << 30
PROBE_S = 60.0
"""How long a GPU of a cluster is waited for, to ask how much memory it has."""


@dataclass(frozen=True)
class Gpu:
    """Figures of a kind of GPU, from its maker's data sheet: dense bfloat16, one direction of links."""

    memory_bytes: int
    flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of its node (NVLink)."""
    network_bytes_per_s: float
    """To other nodes: one network adapter a GPU, as such nodes are sold."""


GPUS = {
    "A100": Gpu(79 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "H100": Gpu(79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "H200": Gpu(139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
}
"""The kinds that times can be computed for; memory as CUDA reports it."""

GPUS_PER_NODE = 8
NODE_MEMORY_BYTES = 2048 * GIB
"""Host memory of a node that is only thought of."""
NODE_CPUS = 128


@dataclass(frozen=True)
class Machines:
    """Nodes alike; memory is that of the smallest GPU and of the node with the least."""

    name: str
    nodes: int
    cpus: int
    gpus: int
    gpu_bytes: int
    """0 where it is not known."""
    host_bytes: int
    gpu: Gpu | None = None
    """Its figures, where its kind is known."""

    @property
    def gpus_per_node(self) -> int:
        return max(1, self.gpus // self.nodes)

    @classmethod
    def here(cls) -> Machines:
        """This machine, as far as it is free."""
        gpus, gpu_bytes, kind = _visible_gpus()
        free = psutil.virtual_memory().available
        return cls("this machine", 1, os.cpu_count() or 1, gpus, gpu_bytes, free, known_gpu(kind))

    @classmethod
    def thought_of(cls, wish: str) -> Machines:
        """The machines that ``8xH100`` describes, eight GPUs a node.

        Raises:
            ConfigError: not of that form, or a kind of GPU whose figures are not known.
        """
        found = re.fullmatch(r"([1-9]\d*)x(\w+)", wish)
        if not found or found[2].upper() not in GPUS:
            raise ConfigError(f"--on {wish!r} is not of the form 8xH100; known are {', '.join(GPUS)}")
        count, gpu = int(found[1]), GPUS[found[2].upper()]
        nodes = -(-count // GPUS_PER_NODE)
        return cls(wish, nodes, nodes * NODE_CPUS, count, gpu.memory_bytes, NODE_MEMORY_BYTES, gpu)

    @classmethod
    def joined(cls) -> Machines:
        """The Ray cluster this process is connected to; a short task on a GPU says what kind it is."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in alive))
        gpu_bytes, kind = 0, ""
        if gpus:
            probe = ray.remote(num_gpus=1, num_cpus=0)(_visible_gpus).remote()
            try:
                _, gpu_bytes, kind = ray.get(probe, timeout=PROBE_S)
            except GetTimeoutError:
                ray.cancel(probe)
                logger.warning("no GPU of the cluster was free within %.0f s: their memory is not checked", PROBE_S)
        used = [node for node in alive if node.get("GPU")] or alive
        return cls(
            "the Ray cluster",
            len(used),
            int(sum(node.get("CPU", 0) for node in alive)),
            gpus,
            gpu_bytes,
            int(min(node.get("memory", 0) for node in used)),
            known_gpu(kind),
        )


def known_gpu(kind: str) -> Gpu | None:
    """Figures of the GPU that CUDA calls ``kind``."""
    return next((gpu for name, gpu in GPUS.items() if name in kind), None)


def _visible_gpus() -> tuple[int, int, str]:
    """Count, memory of the smallest in bytes, and name of the GPUs this process sees."""
    import torch

    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return len(every), min((p.total_memory for p in every), default=0), every[0].name if every else ""
