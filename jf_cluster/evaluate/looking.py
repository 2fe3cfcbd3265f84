"""A close look at how a model decodes, for the pictures: one response forward by forward, and a grid of settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from ray.exceptions import GetTimeoutError, RayError

from jf_cluster.collect.crew import Crew, WorkerModels
from jf_cluster.collect.prompts import Prompt
from jf_cluster.config import Config
from jf_cluster.evaluate.worker import Evaluator
from jf_cluster.jacobi.calibration import Measured, Survey
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting
from jf_cluster.jacobi.sampling import prompt_key
from jf_cluster.jacobi.text import pieces
from jf_cluster.jacobi.watching import Watched, watch
from jf_cluster.messages import first_line
from jf_cluster.whole_files import write_whole

logger = logging.getLogger(__name__)

BLOCK_SIZES = (4, 8, 16, 32)
BLOCKS = (1, 2, 3)
"""Blocks in flight, K; 1 is Jacobi decoding."""
SURVEYED = 3
"""Prompts the grid is measured on."""


@dataclass(frozen=True)
class Look:
    """How model ``round`` decodes one held-out prompt in both modes, and what each setting of the grid gives."""

    round: int
    prompt: str
    tokens: tuple[str, ...]
    """Text of each response token; the same in both modes in float32, else the Jacobi mode's."""
    jacobi: Watched
    multiblock: Watched
    measured: tuple[Measured, ...]

    def speedup(self, block_size: int, blocks: int) -> float:
        """Predicted tokens per second of a setting of the grid over those of AR."""
        ar = next(m.tps for m in self.measured if m.drafting == AUTOREGRESSIVE)
        wanted = _setting(block_size, blocks)
        return next(m.tps for m in self.measured if replace(m.drafting, pool=wanted.pool) == wanted) / ar


class Looker(Evaluator):
    """The job of looking, with the model as the one that evaluates has it."""

    def __init__(self, config: Config, round_number: int, models: WorkerModels) -> None:
        super().__init__(config, round_number, (), models)
        self.round_number = round_number

    def look(self, prompts: Sequence[Prompt]) -> Look:
        """Watch the first prompt, survey the first few."""
        settings, prompt = self.config.evaluate, prompts[0]
        key = prompt_key(self.config.seed, 0, prompt.prompt_id)

        def watched(drafting: Drafting) -> Watched:
            return watch(
                self.model,
                prompt.tokens.tolist(),
                max_new_tokens=settings.max_new_tokens,
                end_ids=self.end_ids,
                drafting=drafting,
                key=key,
            )

        jacobi = watched(Drafting("jacobi", **settings.decoding.model_dump()))
        surveyed = [p.tokens.tolist() for p in prompts[:SURVEYED]]
        survey = Survey(self.model, surveyed, frozenset(self.end_ids), settings.max_new_tokens)
        survey.measure(AUTOREGRESSIVE)
        for block_size in BLOCK_SIZES:
            for blocks in BLOCKS:
                survey.measure(replace(_setting(block_size, blocks), pool=settings.decoding.pool))
        return Look(
            round=self.round_number,
            prompt=self.tokenizer.decode(prompt.tokens),
            tokens=pieces(self.tokenizer.decode, prompt.tokens.tolist(), jacobi.tokens),
            jacobi=jacobi,
            multiblock=watched(Drafting("multiblock", **settings.decoding.model_dump())),
            measured=tuple(survey.tried.values()),
        )


def _setting(block_size: int, blocks: int) -> Drafting:
    return Drafting("jacobi" if blocks == 1 else "multiblock", block_size, blocks)


def look_at(config: Config, round_number: int, prompts: Sequence[Prompt], crew: Crew) -> Path | None:
    """Look at model ``round_number`` and keep what was seen; None where no worker could, which fails nothing."""
    try:
        seen: Look = crew.ask(config.collect.batch_timeout_s, Looker, (config, round_number), "look", prompts)
    except (RayError, GetTimeoutError) as error:
        logger.warning("no pictures of how model %d decodes: %s", round_number, first_line(error))
        return None
    path = _path(config, round_number)
    write_whole(path, _FILE.dump_json(seen, indent=1))
    return path


def load_look(config: Config, round_number: int) -> Look | None:
    """What was seen of a round's model; None where nothing was, or its file cannot be read."""
    path = _path(config, round_number)
    if not path.is_file():
        return None
    try:
        return _FILE.validate_json(path.read_bytes())
    except ValidationError as error:
        reason = first_line(error)
        logger.warning("no pictures of how model %d decodes: %s cannot be read (%s)", round_number, path, reason)
        return None


def _path(config: Config, round_number: int) -> Path:
    return config.run_dir / "evaluation" / f"round-{round_number:03d}-look.json"


_FILE = TypeAdapter(Look)
