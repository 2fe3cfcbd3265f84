"""The load of other nodes comes from a probe that lives there."""

from __future__ import annotations

import pytest
import ray

from jf_cluster.tracking.system import other_nodes, probes, samples

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
