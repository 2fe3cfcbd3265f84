"""Collecting: prompts are decoded by Ray actors and their Jacobi trajectories written to the store."""

from jf_cluster.collect.collecting import CollectError, collect_round

__all__ = ["CollectError", "collect_round"]
