"""What all command lines share: their options, logging, and errors as one clear message with an exit code.

Exit codes: 0 done, 1 something failed, 2 wrong input, 130 interrupted, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jf_cluster.config import Config, ConfigError, load_config
from jf_cluster.ray_environment import HOME_VARIABLE
from jf_cluster.stopping import listen, was_terminated
from jf_cluster.typed import Typed, in_a_copy

# Ray and torch take seconds to import: --help and a mistyped setting are answered without them.
if TYPE_CHECKING:
    from jf_cluster.rounds import Rounds

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = Path("configs/tiny.yaml")

ConfigPath = Annotated[Path, typer.Option("--config", help="Configuration file; the shipped ones are in configs/.")]
RoundNumber = Annotated[
    int | None, typer.Option("--round", min=0, help="Round (0: the base). Default: the one that is due.")
]
MadeRound = Annotated[
    int | None, typer.Option("--round", min=1, help="Round, from 1 (0 is the base). Default: the one that is due.")
]
LastRound = Annotated[
    int | None, typer.Option("--round", min=1, help="Rounds to bring the run to. Default: the configuration's.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings on top of the file, for example train.learning_rate=1e-5 name=other."),
]


def start_logging() -> None:
    """One line an event on stderr; the libraries below speak up from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("jf_cluster").setLevel(logging.INFO)
    logging.getLogger("trajectory_store").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn expected errors into one message and an exit code; anything else is a bug and keeps its traceback."""
    listen()
    try:
        yield
    except ConfigError as error:
        raise _exit(str(error), 2) from error
    except KeyboardInterrupt as error:
        if was_terminated(error):
            raise _exit("stopped by SIGTERM; the same command carries on from here", 143) from error
        raise _exit("stopped; the same command carries on from here", 130) from error
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        raise _exit(str(error) or type(error).__name__, code) from error


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that is expected to happen, or None for a bug."""
    from ray.exceptions import RayError

    from jf_cluster.cluster import ClusterError
    from jf_cluster.collect import CollectError
    from jf_cluster.collect.dispatch import DispatchError
    from jf_cluster.collect.prompts import PromptsError
    from jf_cluster.evaluate.evaluation import EvaluateError
    from jf_cluster.evaluate.graders.sandbox import SandboxError
    from jf_cluster.jacobi.decoding import PromptError
    from jf_cluster.jacobi.support import UnsupportedModelError
    from jf_cluster.models import ModelError
    from jf_cluster.preflight import PreflightError
    from jf_cluster.rounds import RunBusyError
    from jf_cluster.train import TrainingError
    from trajectory_store import StoreError

    if isinstance(error, PromptsError | ModelError | PromptError | UnsupportedModelError):
        return 2
    stages = (CollectError, DispatchError, EvaluateError, SandboxError, TrainingError)
    if isinstance(error, (PreflightError, ClusterError, RunBusyError, *stages, StoreError, RayError, OSError)):
        return 1
    return None


def _exit(message: str, code: int) -> typer.Exit:
    from trajectory_store import without_secrets

    typer.secho(f"error: {without_secrets(message)}", fg=typer.colors.RED, err=True)
    return typer.Exit(code)


def home(config: Config) -> Path:
    """Directory that relative paths of a configuration are taken from.

    Raises:
        ConfigError: the job runs in Ray's temporary copy of a working directory and nothing says where home is.
    """
    if HOME_VARIABLE in os.environ:
        return Path(os.environ[HOME_VARIABLE])
    written = [str(config.runs_dir), *([config.store] if config.store and "://" not in config.store else [])]
    if in_a_copy() and not all(Path(path).is_absolute() for path in written):
        raise ConfigError(
            "this job runs in a temporary copy of the working directory, where results would be lost: give an absolute "
            f"path on storage that all nodes share (runs_dir=/shared/runs) or set {HOME_VARIABLE} where Ray is started"
        )
    return Path.cwd()


def load(path: Path, overrides: list[str] | None) -> Config:
    """Read a configuration; relative paths become absolute, so that every process takes them alike."""
    config = load_config(path, tuple(overrides or ()))
    return config.anchored(home(config))


def run(
    path: Path,
    overrides: list[str] | None,
    stage: Callable[[Rounds], None],
    round_number: int | None = None,
    *,
    any_task: bool = False,
) -> None:
    """Carry out a stage of the run that a configuration describes; ``round_number`` is the round it was asked for.

    ``any_task`` is for a stage that only evaluates: its task need not be the run's own.
    """
    start_logging()
    with clear_errors():
        config = load(path, overrides)
        from jf_cluster.rounds import opened

        typed = Typed(None if path == DEFAULT_CONFIG else path, tuple(overrides or ()), round_number)
        with opened(config, typed, any_task=any_task) as rounds:
            stage(rounds)
