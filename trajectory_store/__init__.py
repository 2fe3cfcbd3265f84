"""The trajectory store: Jacobi trajectories in Arrow shards, on local disks and object stores.

Imports pyarrow and numpy only. See docs/store.md for the format and its guarantees.
"""

from trajectory_store.errors import (
    CorruptShardError,
    InvalidNameError,
    InvalidTrajectoryError,
    MissingShardError,
    ProvenanceMismatchError,
    RoundNotFoundError,
    RoundNotSealedError,
    RoundSealedError,
    SchemaVersionError,
    StoreError,
    StoreUnavailableError,
)
from trajectory_store.manifest import Manifest, ShardEntry
from trajectory_store.order import global_order
from trajectory_store.provenance import Provenance
from trajectory_store.reader import TrajectoryReader
from trajectory_store.store import Round, TrajectoryStore
from trajectory_store.trajectory import Trajectory
from trajectory_store.writer import TrajectoryWriter

__all__ = [
    "CorruptShardError",
    "InvalidNameError",
    "InvalidTrajectoryError",
    "Manifest",
    "MissingShardError",
    "Provenance",
    "ProvenanceMismatchError",
    "Round",
    "RoundNotFoundError",
    "RoundNotSealedError",
    "RoundSealedError",
    "SchemaVersionError",
    "ShardEntry",
    "StoreError",
    "StoreUnavailableError",
    "Trajectory",
    "TrajectoryReader",
    "TrajectoryStore",
    "TrajectoryWriter",
    "global_order",
]
