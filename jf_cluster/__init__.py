"""Jacobi Forcing at cluster scale: causal language models that decode several tokens per forward pass."""

__version__ = "0.1.0"
