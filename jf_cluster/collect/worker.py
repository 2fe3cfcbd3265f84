"""The job of collecting: prompts in, responses and their Jacobi trajectories into the store.

Each worker holds the newest model (and the base, where that one writes the responses), and a store writer of its own,
so workers never wait for each other and trajectories never travel through Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TypedDict

import numpy as np

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.graders import grade
from jf_cluster.jacobi.one_pass import respond_and_trace
from jf_cluster.jacobi.responses import Response, generate_responses
from jf_cluster.jacobi.sampling import Sampling, prompt_key
from jf_cluster.jacobi.text import decode_behind
from jf_cluster.jacobi.traces import Trace
from jf_cluster.jacobi.trajectories import trace
from jf_cluster.models import end_ids, load_tokenizer
from trajectory_store import Provenance, Trajectory, TrajectoryStore


@dataclass(frozen=True)
class Counts:
    """What a batch came to; counts of batches add up."""

    prompts: int = 0
    response_tokens: int = 0
    blocks: int = 0
    iterations: int = 0
    disagreements: int = 0
    """Response tokens that are not the newest model's own choice: its drift from the base, or rounding."""
    unfinished: int = 0
    """Responses cut at the length limit."""
    reused: int = 0
    """Responses taken from an earlier round."""
    respond_s: float = 0.0
    """Writing responses the newest model does not write itself, or finding them."""
    trace_s: float = 0.0
    """Trajectories, and the responses that the newest model writes on the way."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Iterating(TypedDict):
    """How blocks iterate, whoever writes the responses."""

    block_size: int
    keys: Sequence[int]
    forward_tokens: int
    sampling: Sampling


class Collector:
    """Decodes batches of prompts and commits their trajectories; a job of jf_cluster.collect.crew.

    Args:
        round_number: r; trajectories are those of model r-1.
        provenance: names that model by its hash.
        writer_id: names this worker's shards.

    Raises:
        ModelError: model r-1 is missing or another one than ``provenance`` names.
    """

    def __init__(
        self, config: Config, round_number: int, provenance: Provenance, writer_id: str, models: WorkerModels
    ) -> None:
        self.config = config
        self.round_number = round_number
        self.tokenizer = load_tokenizer(config)
        self.model = models.of_round(round_number - 1, provenance.model_hash)
        self.end_ids = end_ids(self.model, self.tokenizer)
        own = config.collect.responses == "self"
        self.write = partial(generate_responses, self.model) if own else models.base_writer()
        store = TrajectoryStore(config.store_url)
        self.earlier = _answered_by_base(config, store, round_number)
        self.writer = store.round(round_number).writer(
            provenance,
            writer_id=writer_id,
            shard_bytes=config.collect.shard_bytes,
            vocabulary_size=self.model.config.vocab_size,
        )
        self.writer.__enter__()
        self.uncommitted: list[str] = []
        self.committed_at = time.monotonic()

    def run(self, prompts: Sequence[Prompt]) -> Report[Counts]:
        """Decode a batch; its rows are committed now or, to keep shards large, with a later batch."""
        begun = time.monotonic()
        keys = [prompt_key(self.config.seed, self.round_number, p.prompt_id) for p in prompts]
        rows = self._own(prompts, keys)
        others = [i for i, row in enumerate(rows) if row is None]
        asked = time.monotonic()
        responses, reused = self._of_base([prompts[i] for i in others], [keys[i] for i in others])
        answered = time.monotonic()
        traces = self._towards(responses, [prompts[i] for i in others], [keys[i] for i in others])
        for i, row in zip(others, zip(responses, traces, strict=True), strict=True):
            rows[i] = row
        found = [row for row in rows if row is not None]
        for prompt, (response, trajectory) in zip(prompts, found, strict=True):
            self.writer.append(
                Trajectory(
                    prompt.prompt_id,
                    prompt.tokens,
                    np.asarray(response.tokens, dtype=np.int32),
                    response.finished,
                    trajectory.iterations,
                    trajectory.accepted,
                    trajectory.tails,
                )
            )
            self.uncommitted.append(prompt.prompt_id)
        counts = Counts(
            prompts=len(prompts),
            response_tokens=sum(len(r.tokens) for r, _ in found),
            blocks=sum(len(t.iterations) for _, t in found),
            iterations=sum(int(t.iterations.sum()) for _, t in found),
            disagreements=sum(t.disagreements for _, t in found),
            unfinished=sum(not r.finished for r, _ in found),
            reused=reused,
            respond_s=answered - asked,
            trace_s=time.monotonic() - begun - (answered - asked),
        )
        due = time.monotonic() - self.committed_at >= self.config.collect.commit_every_s
        return Report(counts, self._commit() if due else [])

    def finish(self) -> list[str]:
        """Commit what is buffered; give the ids that are now safe."""
        return self._commit()

    def _commit(self) -> list[str]:
        self.writer.commit()
        safe, self.uncommitted, self.committed_at = self.uncommitted, [], time.monotonic()
        return safe

    def _own(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[tuple[Response, Trace] | None]:
        """Responses the newest model writes, with their trajectories; None where the base's are wanted."""
        settings = self.config.collect
        if settings.generator == "vllm" or (settings.responses == "base" and self.round_number > 1):
            return [None] * len(prompts)
        written = respond_and_trace(
            self.model,
            [p.tokens for p in prompts],
            max_new_tokens=settings.max_new_tokens,
            end_ids=self.end_ids,
            **self._iterating(keys),
        )
        if settings.responses != "verified" or self.round_number == 1:
            return list(written)
        finished = [i for i, (response, _) in enumerate(written) if response.finished]
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        pairs = [
            (decode_behind(decode, prompts[i].tokens.tolist(), written[i][0].tokens), prompts[i].answer)
            for i in finished
        ]
        threads = max(1, int(settings.cpus_per_worker))
        verdicts = grade(self.config.prompts.grader, pairs, self.config.sandbox, threads)
        right = {i for i, verdict in zip(finished, verdicts, strict=True) if verdict}
        return [row if i in right else None for i, row in enumerate(written)]

    def _of_base(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> tuple[list[Response], int]:
        """Give the base's responses, and how many of them an earlier round already holds."""
        found = [self._earlier_response(prompt) for prompt in prompts]
        missing = [i for i, response in enumerate(found) if response is None]
        written = self.write(
            [prompts[i].tokens for i in missing],
            max_new_tokens=self.config.collect.max_new_tokens,
            end_ids=self.end_ids,
            sampling=Sampling(self.config.collect.temperature),
            keys=[keys[i] for i in missing],
        )
        for i, response in zip(missing, written, strict=True):
            found[i] = response
        return [r for r in found if r is not None], len(prompts) - len(missing)

    def _towards(self, responses: Sequence[Response], prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Trace]:
        """Trajectories of the newest model towards responses it did not write."""
        return trace(self.model, [p.tokens for p in prompts], [r.tokens for r in responses], **self._iterating(keys))

    def _iterating(self, keys: Sequence[int]) -> Iterating:
        settings = self.config.collect
        return Iterating(
            block_size=settings.block_size_of(self.round_number),
            keys=keys,
            forward_tokens=settings.forward_tokens,
            sampling=Sampling(settings.temperature),
        )

    def _earlier_response(self, prompt: Prompt) -> Response | None:
        for reader in self.earlier:
            row = reader.find(prompt.prompt_id)
            if row is not None and np.array_equal(row.prompt, prompt.tokens):
                return Response(row.response, row.finished)
        return None


def _answered_by_base(config: Config, store: TrajectoryStore, round_number: int) -> list:
    """Open the earlier rounds whose responses the base wrote, where this round may ask for the same prompts again."""
    if config.prompts.fresh or config.collect.responses == "self" or config.collect.temperature > 0:
        return []
    rounds = range(1, round_number) if config.collect.responses == "base" else range(1, min(2, round_number))
    return [store.round(r).reader() for r in rounds if store.round(r).is_sealed]
