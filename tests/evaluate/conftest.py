"""The flow tests' minuscule model, for what needs a tokenizer."""

from tests.flow.conftest import base_model

__all__ = ["base_model"]
