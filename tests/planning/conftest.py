"""Configurations of models that exist only as a config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jf_cluster.config import Config
from jf_cluster.planning.fitting import changed
from jf_cluster.planning.scaling import MODELS


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Config]:
    """Make a configuration that trains a 7B or 70B model on GPUs; keyword arguments are dotted through ``__``."""

    def make(model: str = "7B", **changes: Any) -> Config:
        directory = tmp_path / model
        MODELS[model]().save_pretrained(directory)
        gpus = {"gpus_per_worker": 1, "workers": 8}
        config = Config.model_validate(
            {
                "runs_dir": tmp_path / "runs",
                "model": {"path": str(directory), "dtype": "bfloat16"},
                "collect": gpus | {"responses": "self"},
                "train": gpus | {"micro_batches_per_step": 8, "gradient_checkpointing": True},
            }
        )
        return changed(config, {key.replace("__", "."): value for key, value in changes.items()})

    return make
