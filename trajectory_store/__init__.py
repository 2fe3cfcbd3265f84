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
from trajectory_store.feed import FeedStep, Position, TrajectoryFeed
from trajectory_store.follow import FollowPosition, FollowStep, RoundFollower
from trajectory_store.manifest import Manifest, ShardEntry
from trajectory_store.order import balanced_shares, global_order, order_windows, step_bounds
from trajectory_store.prompt_ids import PromptIds
from trajectory_store.provenance import Provenance
from trajectory_store.reader import TrajectoryReader
from trajectory_store.rows import ArrivingRows, JoinedRows, Rows, SealedRows, WaitInterruptedError
from trajectory_store.store import Round, TrajectoryStore
from trajectory_store.trajectory import Trajectory
from trajectory_store.urls import without_secrets
from trajectory_store.writer import TrajectoryWriter

__all__ = [
    "ArrivingRows",
    "CorruptShardError",
    "FeedStep",
    "FollowPosition",
    "FollowStep",
    "InvalidNameError",
    "InvalidTrajectoryError",
    "JoinedRows",
    "Manifest",
    "MissingShardError",
    "Position",
    "PromptIds",
    "Provenance",
    "ProvenanceMismatchError",
    "Round",
    "RoundFollower",
    "RoundNotFoundError",
    "RoundNotSealedError",
    "RoundSealedError",
    "Rows",
    "SchemaVersionError",
    "SealedRows",
    "ShardEntry",
    "StoreError",
    "StoreUnavailableError",
    "Trajectory",
    "TrajectoryFeed",
    "TrajectoryReader",
    "TrajectoryStore",
    "TrajectoryWriter",
    "WaitInterruptedError",
    "balanced_shares",
    "global_order",
    "order_windows",
    "step_bounds",
    "without_secrets",
]
