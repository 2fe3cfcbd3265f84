"""Every error the store raises. A message says what was wrong, in which file or round, and what to do."""

from __future__ import annotations


class StoreError(Exception):
    """Base class: whatever the store raises on purpose is one of these."""


class InvalidTrajectoryError(StoreError, ValueError):
    """A trajectory whose parts contradict each other; nothing of it was buffered."""


class InvalidNameError(StoreError, ValueError):
    """A round number, writer id or URL that may not become part of a file name."""


class CorruptShardError(StoreError):
    """A shard, index or manifest whose bytes are not those that were committed."""


class MissingShardError(CorruptShardError):
    """A file the manifest names is not there."""


class SchemaVersionError(StoreError):
    """A file written by a newer version of the store than this one can read."""


class RoundNotFoundError(StoreError):
    """A round that holds nothing at all."""


class RoundNotSealedError(StoreError):
    """The operation needs a sealed round."""


class RoundSealedError(StoreError):
    """A write to a round that is already sealed; the rows were not counted."""


class ProvenanceMismatchError(StoreError):
    """Rows of another model, tokenizer, block size, seed or round than the round holds already."""


class StoreUnavailableError(StoreError, OSError):
    """The place the store lives in refused: disk full, permission lost, network gone."""
