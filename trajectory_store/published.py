"""The data formats of the published Jacobi Forcing code, so that data made with it can be used, and made for it.

*Trajectory records*: one JSON object per block, ``data_id``, ``diffusion_itr_id`` (``itr_<block>``), ``prompt_ids``
(prompt and all earlier blocks), ``answer_trajectory_ids`` (every iterate of the block in full, the fixed point last)
and ``teacher_output_ids`` (prompt and whole response).

*Training rows*: one JSON object per prompt, ``data_id``, ``prompt_ids``, ``complete_training_sequence_ids`` (the
prompt, then for each block one noisy iterate and the fixed point) and ``traj_position_indices`` (one per block).

The published collector overwrites its initial guess in place, so that in its files iterate 0 reads as the fixed point.
An iterate that equals the fixed point carries nothing and is dropped, so imported blocks count one iteration too few.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trajectory_store.errors import InvalidTrajectoryError
from trajectory_store.trajectory import IntArray, Trajectory

Record = Mapping[str, Any]


def to_records(trajectory: Trajectory, block_size: int) -> Iterator[dict[str, Any]]:
    """The trajectory as published trajectory records, one per block."""
    teacher = [*trajectory.prompt.tolist(), *trajectory.response.tolist()]
    for block, steps in enumerate(trajectory.iterations.tolist()):
        yield {
            "diffusion_itr_id": f"itr_{block}",
            "data_id": trajectory.prompt_id,
            "prompt_ids": [teacher[: len(trajectory.prompt) + block * block_size]],
            "answer_trajectory_ids": [trajectory.iterate(block, k, block_size).tolist() for k in range(steps + 1)],
            "teacher_output_ids": teacher,
        }


def group_records(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Trajectory records of the same prompt, put together; they must follow each other in the file.

    Raises:
        InvalidTrajectoryError: a record has no data_id, or a prompt's records are scattered.
    """
    group: list[Record] = []
    finished: set[str] = set()
    for number, record in enumerate(records):
        prompt_id = data_id(record, number)
        if group and prompt_id != str(group[0]["data_id"]):
            yield group
            finished.add(str(group[0]["data_id"]))
            group = []
        if prompt_id in finished:
            raise InvalidTrajectoryError(f"records of {prompt_id!r} are scattered over the file: sort it by data_id")
        group.append(record)
    if group:
        yield group


def data_id(record: Record, number: int) -> str:
    """The record's prompt id, as text."""
    if not isinstance(record, Mapping) or record.get("data_id") is None:
        raise InvalidTrajectoryError(f"record {number} has no data_id: not a published trajectory or training file")
    return str(record["data_id"])


def from_records(group: Sequence[Record], block_size: int, end_ids: Sequence[int] = ()) -> Trajectory:
    """The trajectory that a prompt's records describe, cut after the first end token of the response.

    Raises:
        InvalidTrajectoryError: a field is missing or the blocks do not fit together.
    """
    prompt_id = str(group[0]["data_id"])
    try:
        blocks = sorted(group, key=_block_number)
        if [_block_number(block) for block in blocks] != list(range(len(blocks))):
            raise InvalidTrajectoryError(
                f"{prompt_id!r}: blocks are missing or doubled: {list(map(_block_number, blocks))}"
            )
        prompt = _tokens(blocks[0]["prompt_ids"])
        iterates = [[_tokens(i)[-block_size:] for i in block["answer_trajectory_ids"]] for block in blocks]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidTrajectoryError(f"{prompt_id!r}: not a published trajectory record ({error!r})") from error
    return _assemble(prompt_id, prompt, iterates, block_size, end_ids)


def from_training_row(row: Record, block_size: int, end_ids: Sequence[int] = ()) -> Trajectory:
    """The trajectory, one iterate per block, that a training row describes, cut after the first end token.

    Raises:
        InvalidTrajectoryError: a field is missing or the sequence is not made of pairs of blocks.
    """
    prompt_id = data_id(row, 0)
    try:
        prompt = _tokens(row["prompt_ids"])
        sequence = _tokens(row["complete_training_sequence_ids"])[len(prompt) :]
        blocks = len(row["traj_position_indices"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidTrajectoryError(f"{prompt_id!r}: not a published training row ({error!r})") from error
    if len(sequence) != 2 * blocks * block_size:
        raise InvalidTrajectoryError(
            f"{prompt_id!r}: {len(sequence)} tokens after the prompt are not {blocks} pairs of blocks of {block_size}"
        )
    pairs = sequence.reshape(blocks, 2, block_size)
    return _assemble(prompt_id, prompt, [list(pair) for pair in pairs], block_size, end_ids)


def _assemble(
    prompt_id: str, prompt: IntArray, blocks: Sequence[Sequence[IntArray]], block_size: int, end_ids: Sequence[int]
) -> Trajectory:
    """From every block's iterates in full, the fixed point last."""
    for number, iterates in enumerate(blocks):
        lengths = {len(iterate) for iterate in iterates}
        if len(lengths) != 1 or (number < len(blocks) - 1 and lengths != {block_size}):
            raise InvalidTrajectoryError(
                f"{prompt_id!r}: block {number} has iterates of lengths {sorted(lengths)}, blocks are of {block_size}"
            )
    response = np.concatenate([np.zeros(0, np.int32), *(iterates[-1] for iterates in blocks)])
    ends = np.flatnonzero(np.isin(response, end_ids))
    if len(ends):
        response = response[: int(ends[0]) + 1]
    iterations, accepted, tails = [], [], [np.zeros(0, np.int32)]
    for start in range(0, len(response), block_size):
        fixed_point = response[start : start + block_size]
        steps = 0
        for iterate in blocks[start // block_size][:-1]:
            different = np.flatnonzero(iterate[: len(fixed_point)] != fixed_point)
            if len(different):
                steps += 1
                accepted.append(int(different[0]))
                tails.append(iterate[int(different[0]) : len(fixed_point)])
        iterations.append(steps)
    return Trajectory(
        prompt_id=prompt_id,
        prompt=prompt,
        response=response.astype(np.int32),
        finished=bool(len(ends)),
        iterations=np.array(iterations, np.int32),
        accepted=np.array(accepted, np.int32),
        tails=np.concatenate(tails).astype(np.int32),
    )


def _block_number(record: Record) -> int:
    match = re.search(r"(\d+)$", str(record["diffusion_itr_id"]))
    if match is None:
        raise ValueError(f"diffusion_itr_id {record['diffusion_itr_id']!r} has no number")
    return int(match[1])


def _tokens(values: Any) -> IntArray:
    """Token ids from a list, or from lists nested around one list (batches of one)."""
    while isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return np.asarray(values, dtype=np.int32).reshape(len(values))
