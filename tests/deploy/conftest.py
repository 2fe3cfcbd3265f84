"""The flow tests' model."""

from tests.flow.conftest import base_model

__all__ = ["base_model"]
