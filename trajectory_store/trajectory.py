"""One row of the store: a prompt's response and all its Jacobi trajectories, and what makes one valid.

Letters used in shapes: P prompt tokens, T response tokens, n block size, B = ceil(T / n) blocks, K_b stored iterates
of block b.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trajectory_store.errors import InvalidTrajectoryError

IntArray = npt.NDArray[np.int32]

MAX_PROMPT_ID_BYTES = 1024
DIGEST_BYTES = 16
ARRAY_FIELDS = ("prompt", "response", "iterations", "accepted", "tails")


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A response with every iterate on the way to it, each stored as its unaccepted tail.

    Iterate K_b, the fixed point, is not stored: it is the response. Iterates 0..K_b-1 are, and each has an accepted
    prefix shorter than its block.
    """

    prompt_id: str
    prompt: IntArray
    """Token ids, [P]."""
    response: IntArray
    """The fixed points, end token included when finished, [T]."""
    finished: bool
    """False when the response was cut at its length limit."""
    iterations: IntArray
    """K_b, the iterations block b needed to reach its fixed point, [B]."""
    accepted: IntArray
    """Accepted prefix length of iterates 0..K_b-1 of each block, block after block, [sum K_b]."""
    tails: IntArray
    """For each stored iterate its tokens from `accepted` to the block's end, [sum (block length - accepted)]."""

    def block_lengths(self, block_size: int) -> IntArray:
        """Tokens in each block, [B]: the block size, except for a shorter last block."""
        return block_lengths(len(self.response), block_size)

    def iterate(self, block: int, k: int, block_size: int) -> IntArray:
        """Iterate k of a block in full, [block length]; k = K_b gives the fixed point.

        Raises:
            IndexError: there is no such block or iterate.
        """
        lengths = self.block_lengths(block_size)
        if not 0 <= block < len(lengths):
            raise IndexError(f"block {block} of {len(lengths)} in {self.prompt_id!r}")
        start = block * block_size
        fixed_point = self.response[start : start + lengths[block]]
        if k == self.iterations[block]:
            return fixed_point.copy()
        if not 0 <= k < self.iterations[block]:
            raise IndexError(f"iterate {k} of {self.iterations[block]} in block {block} of {self.prompt_id!r}")
        entry = int(self.iterations[:block].sum()) + k
        tail_lengths = np.repeat(lengths, self.iterations)[: entry + 1] - self.accepted[: entry + 1]
        tail_end = int(tail_lengths.sum())
        tail = self.tails[tail_end - int(tail_lengths[-1]) : tail_end]
        return np.concatenate([fixed_point[: self.accepted[entry]], tail])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return (
            self.prompt_id == other.prompt_id
            and self.finished == other.finished
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ARRAY_FIELDS)
        )

    def __hash__(self) -> int:
        return hash(self.prompt_id)

    def copy(self) -> Trajectory:
        """The same with arrays of its own: those of a reader are views that keep the row's whole record batch."""
        return replace(self, **{name: getattr(self, name).copy() for name in ARRAY_FIELDS})

    @property
    def nbytes(self) -> int:
        """Bytes of the token arrays in memory."""
        return sum(getattr(self, name).nbytes for name in ARRAY_FIELDS)


def block_lengths(response_tokens: int, block_size: int) -> IntArray:
    """Tokens in each block of a response, [ceil(response_tokens / block_size)]."""
    blocks = -(-response_tokens // block_size)
    lengths = np.full(blocks, block_size, np.int32)
    if blocks:
        lengths[-1] = response_tokens - (blocks - 1) * block_size
    return lengths


def normalised(trajectory: Trajectory, block_size: int) -> Trajectory:
    """The trajectory with every array copied to contiguous little-endian int32, checked for consistency.

    Raises:
        InvalidTrajectoryError: names the first field that contradicts another.
    """
    prompt_id = trajectory.prompt_id
    if not isinstance(prompt_id, str) or not 0 < len(prompt_id.encode(errors="replace")) <= MAX_PROMPT_ID_BYTES:
        raise InvalidTrajectoryError(f"prompt id {prompt_id!r:.80} must be 1 to {MAX_PROMPT_ID_BYTES} bytes of text")
    try:
        prompt_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidTrajectoryError(f"prompt id {prompt_id!r} cannot be written as UTF-8") from error
    arrays = {name: _int32(prompt_id, name, getattr(trajectory, name)) for name in ARRAY_FIELDS}
    if not len(arrays["prompt"]):
        raise InvalidTrajectoryError(f"{prompt_id!r}: the prompt is empty, so that nothing precedes the response")
    checked = Trajectory(prompt_id=prompt_id, finished=bool(trajectory.finished), **arrays)
    lengths = checked.block_lengths(block_size)
    if len(checked.iterations) != len(lengths):
        raise InvalidTrajectoryError(
            f"{prompt_id!r}: iterations has {len(checked.iterations)} entries, {len(checked.response)} response tokens "
            f"in blocks of {block_size} make {len(lengths)} blocks"
        )
    if len(checked.iterations) and checked.iterations.min() < 0:
        raise InvalidTrajectoryError(f"{prompt_id!r}: negative iterations")
    iterates = int(checked.iterations.sum(dtype=np.int64))
    if len(checked.accepted) != iterates:
        raise InvalidTrajectoryError(
            f"{prompt_id!r}: accepted has {len(checked.accepted)} entries for {iterates} stored iterates"
        )
    tail_lengths = np.repeat(lengths, checked.iterations) - checked.accepted
    if iterates and (checked.accepted.min() < 0 or tail_lengths.min() < 1):
        raise InvalidTrajectoryError(f"{prompt_id!r}: an accepted prefix is negative or not shorter than its block")
    if len(checked.tails) != tail_lengths.sum(dtype=np.int64):
        raise InvalidTrajectoryError(
            f"{prompt_id!r}: tails has {len(checked.tails)} tokens, accepted says {tail_lengths.sum(dtype=np.int64)}"
        )
    for name in ("prompt", "response", "tails"):
        if len(arrays[name]) and arrays[name].min() < 0:
            raise InvalidTrajectoryError(f"{prompt_id!r}: negative token id in {name}")
    return checked


def require_vocabulary(trajectory: Trajectory, size: int) -> None:
    """Raise InvalidTrajectoryError if a token id is not below `size`."""
    for name in ("prompt", "response", "tails"):
        tokens = getattr(trajectory, name)
        if len(tokens) and tokens.max() >= size:
            raise InvalidTrajectoryError(
                f"{trajectory.prompt_id!r}: {name} holds token {tokens.max()}, the vocabulary has {size}"
            )


def _int32(prompt_id: str, name: str, values: object) -> IntArray:
    array = np.asarray(values)
    if array.dtype == np.dtype("<i4") and array.ndim == 1:
        return array.copy()  # the caller may go on writing into its own
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise InvalidTrajectoryError(
            f"{prompt_id!r}: {name} must be one-dimensional integers, got {array.dtype}{list(array.shape)}"
        )
    if array.dtype.itemsize > 4 or array.dtype == np.uint32:
        limit = np.iinfo(np.int32)
        if array.size and (array.min() < limit.min or array.max() > limit.max):
            raise InvalidTrajectoryError(f"{prompt_id!r}: {name} holds values that do not fit int32")
    return np.array(array, dtype="<i4")


def digest(trajectory: Trajectory) -> bytes:
    """A hash of what the row says (not of how it is stored), the same whoever computes it; 16 bytes.

    Takes a normalised trajectory.
    """
    encoded_id = trajectory.prompt_id.encode()
    arrays = [getattr(trajectory, name) for name in ARRAY_FIELDS]
    header = np.array([len(encoded_id), trajectory.finished, *map(len, arrays)], "<i8")
    parts = b"".join([header.tobytes(), encoded_id, *(array.tobytes() for array in arrays)])
    return hashlib.sha256(parts).digest()[:DIGEST_BYTES]
