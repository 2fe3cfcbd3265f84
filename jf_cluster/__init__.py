"""Jacobi Forcing at cluster scale: causal language models that decode several tokens per forward pass."""

from jf_cluster import ray_environment as ray_environment  # Ray reads its environment when it is imported

__version__ = "0.1.0"
