"""Another node: its load comes from a probe that lives there, and its sudden end costs a round only time."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import ray

from jf_cluster.tracking.system import other_nodes, probes, samples
from tests.flow.conftest import collected, small_config
from tests.flow.faulty import OnDoomedNode
from tests.second_node import Node, one_core_left_here, second_node

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_probe_samples_the_node_it_was_put_on() -> None:
    assert other_nodes() == {}, "the driver's own node is sampled without an actor"
    here = ray.get_runtime_context().get_node_id()
    actors = probes({"node-1": here})
    found: dict[str, dict[str, float]] = {}
    for _ in range(30):  # an actor takes seconds to start, and a slow one is left out
        if found := samples(actors):
            break
    assert found["node-1"]["system_memory_usage_percentage"] > 0
    ray.kill(actors["node-1"])
    assert samples(actors) == {}, "a node that is gone says nothing"


def test_a_node_killed_while_it_collects_loses_and_doubles_nothing(reference, tmp_path: Path, base_model: Path) -> None:
    """One collector on each of two nodes; the store is shared, the scratch directories are not."""
    config = small_config(tmp_path, base_model, collect__commit_every_s=1e6, collect__batch_prompts=2)

    def kill(node: Node) -> None:
        while not (tmp_path / "hangs").exists():
            time.sleep(0.05)
        node.kill()

    with one_core_left_here(), second_node() as node:
        (tmp_path / "doomed").write_text(node.node_id)
        killer = threading.Thread(target=kill, args=(node,), daemon=True)
        killer.start()
        manifest = collected(config, worker_class=OnDoomedNode)
        killer.join(timeout=10)
    assert manifest.content_hash == reference[1].content_hash and manifest.rejects == 0
    [attempt] = json.loads((config.run_dir / "collecting" / "round-001.json").read_text())["attempts"]
    # Two prompts were done but not committed, two were under way.
    assert attempt["workers_replaced"] == 1 and attempt["retries"] == 4
