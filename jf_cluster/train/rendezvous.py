"""How the ranks of a group find each other: through a file and loopback on one node, through TCP between nodes.

Ray's own Torch backend opens a TCPStore, which listens on all interfaces even on one machine. This one sets up no
process group; it only tells every rank, in its environment, where to meet. `jf_cluster.train.engine` does the rest.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

INIT_METHOD = "JF_INIT_METHOD"
"""Environment variable that holds torch.distributed's init_method."""


def _announce(init_method: str) -> None:
    import ray.train
    import ray.util

    context = ray.train.get_context()
    os.environ[INIT_METHOD] = init_method
    if init_method.startswith("file://"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    elif (interface := _interface_of(ray.util.get_node_ip_address())) is not None:
        # Gloo would take the host name's address, which often is a loopback one. The ranks plan over it (sharing.py).
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())


def _interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, bound in interfaces if any(each.address == address for each in bound)), None)


def _node_and_meeting_file() -> tuple[str, str]:
    import ray

    return ray.get_runtime_context().get_node_id(), str(Path(tempfile.gettempdir()) / f"jf-ranks-{uuid.uuid4().hex}")


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    method = os.environ.get(INIT_METHOD, "")
    if method.startswith("file://"):
        Path(method.removeprefix("file://")).unlink(missing_ok=True)


class RendezvousBackend(Backend):
    """Ray Train backend that names a meeting point and leaves the process group to the training function."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        places = worker_group.execute(_node_and_meeting_file)
        if len({node for node, _ in places}) == 1:
            method = f"file://{places[0][1]}"
        else:
            address, port = worker_group.execute_single(0, get_address_and_port)
            method = f"tcp://{address}:{port}"
        worker_group.execute(_announce, method)

    def on_shutdown(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        worker_group.execute(_leave)


@dataclass
class RendezvousConfig(TorchConfig):
    """TorchTrainer's configuration that selects :class:`RendezvousBackend`."""

    @property
    def backend_cls(self) -> type[RendezvousBackend]:
        return RendezvousBackend
