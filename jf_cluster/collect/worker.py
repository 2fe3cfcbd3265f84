"""The job of collecting: prompts in, responses and their Jacobi trajectories into the store.

Each worker holds the newest model (and the base, where that one writes the responses), and a store writer of its own,
so workers never wait for each other and trajectories never travel through Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from transformers import PreTrainedModel

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.dispatch import Report
from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.graders import grade
from jf_cluster.jacobi.responses import Response, generate_responses
from jf_cluster.jacobi.sampling import Sampling, prompt_key
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
    trace_s: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


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
        self.base = self.model if config.collect.responses == "self" else models.base()
        self.end_ids = end_ids(self.base, self.tokenizer)
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
        responses, reused = self._responses(prompts, keys)
        answered = time.monotonic()
        settings = self.config.collect
        traces = trace(
            self.model,
            [p.tokens for p in prompts],
            [r.tokens for r in responses],
            block_size=settings.block_size_of(self.round_number),
            keys=keys,
            forward_tokens=settings.forward_tokens,
            sampling=Sampling(settings.temperature),
        )
        for prompt, response, found in zip(prompts, responses, traces, strict=True):
            self.writer.append(
                Trajectory(
                    prompt.prompt_id,
                    prompt.tokens,
                    np.asarray(response.tokens, dtype=np.int32),
                    response.finished,
                    found.iterations,
                    found.accepted,
                    found.tails,
                )
            )
            self.uncommitted.append(prompt.prompt_id)
        counts = Counts(
            prompts=len(prompts),
            response_tokens=sum(len(r.tokens) for r in responses),
            blocks=sum(len(t.iterations) for t in traces),
            iterations=sum(int(t.iterations.sum()) for t in traces),
            disagreements=sum(t.disagreements for t in traces),
            unfinished=sum(not r.finished for r in responses),
            reused=reused,
            respond_s=answered - begun,
            trace_s=time.monotonic() - answered,
        )
        due = time.monotonic() - self.committed_at >= settings.commit_every_s
        return Report(counts, self._commit() if due else [])

    def finish(self) -> list[str]:
        """Commit what is buffered; give the ids that are now safe."""
        return self._commit()

    def _commit(self) -> list[str]:
        self.writer.commit()
        safe, self.uncommitted, self.committed_at = self.uncommitted, [], time.monotonic()
        return safe

    def _responses(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> tuple[list[Response], int]:
        """Give the responses the trajectories lead to, and how many came from an earlier round."""
        mode = self.config.collect.responses
        if mode == "self" or self.round_number == 1:
            return self._written_by(self.model, prompts, keys), 0
        responses: list[Response | None] = [None] * len(prompts)
        if mode == "verified":
            written = self._written_by(self.model, prompts, keys)
            finished = [i for i, own in enumerate(written) if own.finished]
            pairs = [
                (self.tokenizer.decode(written[i].tokens, skip_special_tokens=True), prompts[i].answer)
                for i in finished
            ]
            threads = max(1, int(self.config.collect.cpus_per_worker))
            verdicts = grade(self.config.prompts.grader, pairs, self.config.sandbox, threads)
            for i, right in zip(finished, verdicts, strict=True):
                responses[i] = written[i] if right else None
        reused = 0
        for i, prompt in enumerate(prompts):
            if responses[i] is None and (found := self._earlier_response(prompt)) is not None:
                responses[i] = found
                reused += 1
        missing = [i for i, r in enumerate(responses) if r is None]
        if missing:
            written = self._written_by(self.base, [prompts[i] for i in missing], [keys[i] for i in missing])
            for i, response in zip(missing, written, strict=True):
                responses[i] = response
        return [r for r in responses if r is not None], reused

    def _written_by(self, model: PreTrainedModel, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Response]:
        settings = self.config.collect
        return generate_responses(
            model,
            [p.tokens for p in prompts],
            max_new_tokens=settings.max_new_tokens,
            end_ids=self.end_ids,
            sampling=Sampling(settings.temperature),
            keys=keys,
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
