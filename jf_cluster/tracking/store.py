"""Where MLflow keeps its records, and what is found or made there: experiment, the run directory's key, clients."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from jf_cluster.config import Config
from jf_cluster.locks import lock
from jf_cluster.messages import first_line
from jf_cluster.whole_files import write_whole

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY, ROUND, STAGE = "jf_cluster.run_key", "jf_cluster.round", "jf_cluster.stage"
"""Tags by which a run directory finds its MLflow runs again."""

SUPERSEDED_BY = "jf_cluster.superseded_by"
"""Tag of a stage's run, or of a version in the registry, whose output was made again: what has taken its place."""


def tracking_uri(config: Config) -> str:
    """Where MLflow keeps its records: the configuration, ``MLFLOW_TRACKING_URI``, else SQLite under ``runs_dir``."""
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    # SQLite's own wait for a lock is 5 s, too short when several stages and a dashboard share the file.
    return given or f"sqlite:///{config.runs_dir.absolute() / 'mlflow.db'}?timeout=60"


def is_server(uri: str) -> bool:
    """Whether records go to a server, which cannot see this machine's files."""
    return urlsplit(uri).scheme in ("http", "https")


def experiment_name(config: Config) -> str:
    """The distillation's experiment."""
    return config.tracking.experiment or f"jacobi-forcing/{config.name}"


def client(uri: str) -> MlflowClient:
    """A client of the tracking store and of the model registry in it."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def refusals() -> tuple[type[Exception], ...]:
    """What a store that cannot be used raises: MLflow lets some errors of its data base through, a full disk's too."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


class NotCopiedError(OSError):
    """A file has no copy beside its MLflow run, though MLflow answers; one of :func:`refusals`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not copied to MLflow ({reason})")
        self.reason = reason


def copy_beside(uri: str, run_id: str, path: Path, folder: str | None = None) -> None:
    """Copy a file, or the files of a directory, to where MLflow keeps a run's files; ``folder`` is one in there.

    Raises:
        NotCopiedError: it is not there, or that place cannot be used.
        refusals(): MLflow cannot be reached.
    """
    mlflow = client(uri)
    mlflow.get_run(run_id)
    try:
        if path.is_dir():
            mlflow.log_artifacts(run_id, str(path), folder)
        else:
            mlflow.log_artifact(run_id, str(path), folder)
    # This process writes there itself, to S3 say: a missing library and missing credentials are errors of any kind.
    except Exception as error:
        raise NotCopiedError(path, first_line(error)) from error


def experiment_id(uri: str, name: str, runs_dir: Path) -> str:
    """Id of the experiment, created when missing; safe when several processes do so at once."""
    from mlflow.exceptions import MlflowException

    local = urlsplit(uri).scheme == "sqlite"
    # Two processes that create the same SQLite file both run its migrations, and one of them fails.
    with _locked(runs_dir / "mlflow.lock") if local else nullcontext():
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(name)
        if found is None:
            # Without a location, artifacts of an SQLite store land in ./mlruns of whoever runs first.
            location = (runs_dir.absolute() / "mlartifacts" / name.lstrip("/")).as_uri() if local else None
            try:
                # The kind spares people the choice between MLflow's two layouts, of which the other one is about chats.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return mlflow.create_experiment(name, artifact_location=location, tags=kind)
            except MlflowException:
                found = mlflow.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        return found.experiment_id


def run_key(run_dir: Path) -> str:
    """Identity of the run directory: one deleted and made anew must not continue the old MLflow run."""
    path = run_dir / "tracking" / "key"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            write_whole(path, uuid.uuid4().hex)
        return path.read_text()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        lock(stream)
        yield
