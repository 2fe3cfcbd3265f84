"""The flow tests' minuscule model, for what needs a tokenizer, and a collector in this process."""

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.worker import Collector
from jf_cluster.config import Config
from jf_cluster.models import model_hash
from tests.flow.conftest import base_model
from trajectory_store import Provenance

__all__ = ["base_model"]


def collector_of_round_2(config: Config) -> Collector:
    """Collects with model 1."""
    provenance = Provenance(
        model_hash=model_hash(config.model_dir(1)),
        tokenizer_hash="x",
        block_size=8,
        seed=0,
        round_number=2,
        code_version="0",
        config={},
    )
    return Collector(config, 2, provenance, "writer", WorkerModels(config))
