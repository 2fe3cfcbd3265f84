"""``auto`` settings: which mode, block size, blocks in flight and pool give the most tokens per second here.

Two things are measured apart. *Time per forward* against the number of tokens in it is the machine's: a few forwards
over a cache as long as the prompts. *Acceptance*, the tokens per forward of each setting, is the model's, and does not
depend on what else the machine is doing. Predicted tokens per second are the one divided by the other; AR is among the
settings. The choice is kept in ``decoding.json`` beside the model, one entry for each kind of machine, with its reason.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting, Row
from jf_cluster.jacobi.engine import Batch, decode_rows

logger = logging.getLogger(__name__)

Auto = Literal["auto"]
AUTO: Auto = "auto"
FILE = "decoding.json"

BLOCK_SIZES = (4, 8, 16, 24, 32)
BLOCKS = (2, 3)
POOLS = (0, 2, 4)
WIDTHS = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Tokens in a forward whose time is measured; the rest is interpolated."""
PROMPTS = 6
"""Prompts the acceptance is measured on."""
TOKENS = 96
"""Most response tokens of each."""
REPEATS = 7
MARGIN = 1.03
"""How much faster a setting must be than a simpler one: less is within what measuring again would change."""


@dataclass(frozen=True)
class Measured:
    """One setting: what it accepted and what it should give on this machine."""

    drafting: Drafting
    tpf: float
    forward_tokens: float
    """Tokens the model computes on in one forward, on average."""
    forward_s: float
    tps: float
    """Predicted tokens per second of a single request."""


@dataclass(frozen=True)
class Choice:
    """The setting to decode with, and why."""

    drafting: Drafting
    explanation: str
    speedup: float
    """Predicted tokens per second over those of AR."""
    measured: tuple[Measured, ...] = ()
    """All settings that were tried; empty where the choice was read from a file."""


def choose(model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int]) -> Choice:
    """Give the stored choice for this machine; without one, calibrate on some of ``prompts`` and store the result."""
    if (known := stored(model)) is not None:
        return known
    choice = calibrate(model, prompts, end_ids)
    store(model, choice)
    logger.info("calibrated: %s", choice.explanation)
    return choice


def calibrate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int]) -> Choice:
    """Measure, and choose what should give the most tokens per second for single requests.

    Args:
        prompts: like those to come; a few are enough.

    Raises:
        ValueError: none of them leaves room for a response in the model's context.
    """
    survey = Survey(model, prompts, end_ids)
    measure, tried = survey.measure, survey.tried
    best = measure(AUTOREGRESSIVE)
    plain = [measure(Drafting("jacobi", n)) for n in BLOCK_SIZES]
    leading = sorted(plain, key=lambda m: m.tps)[-2:]
    several = [
        measure(Drafting("multiblock", m.drafting.block_size, blocks=blocks, pool=pool))
        for m in leading
        for blocks in BLOCKS
        for pool in POOLS
    ]
    # From the simplest to the most elaborate: a more elaborate one must earn its place.
    for group in (plain, several):
        fastest = max(group, key=lambda m: m.tps)
        best = fastest if fastest.tps > MARGIN * best.tps else best
    return Choice(best.drafting, _explain(best, tried), best.tps / tried[AUTOREGRESSIVE].tps, tuple(tried.values()))


class Survey:
    """Measures settings one after the other on the same prompts, each once, with at most ``max_new_tokens`` a response.

    Raises:
        ValueError: no prompt leaves room for a response in the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        end_ids: frozenset[int],
        max_new_tokens: int = TOKENS,
    ) -> None:
        self._model, self._end_ids, self._tokens = model, end_ids, min(TOKENS, max_new_tokens)
        self._context = context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self._prompts = [list(p) for p in prompts[:PROMPTS] if 0 < len(p) < context]
        if not self._prompts:
            raise ValueError(
                f"none of the prompts leaves room for a response in the model's context of {context} tokens"
            )
        length = int(statistics.median(map(len, self._prompts)))
        self._times = forward_seconds(model, min(length, max(context - WIDTHS[-1], 1)))
        self.tried: dict[Drafting, Measured] = {}

    def measure(self, drafting: Drafting) -> Measured:
        """What a setting accepts, and what it should give on this machine."""
        if drafting not in self.tried:
            rows = [
                Row(p, i, drafting, min(self._tokens, self._context - len(p)), self._end_ids)
                for i, p in enumerate(self._prompts)
            ]
            for _ in decode_rows(self._model, rows):
                pass
            forwards = sum(len(r.accepted_runs) - 1 for r in rows)
            tokens = sum(len(r.tokens) - 1 for r in rows)
            width = sum(r.forwarded_tokens for r in rows) / forwards if forwards else 1.0
            tpf, seconds = tokens / forwards if forwards else 1.0, interpolate(self._times, width)
            self.tried[drafting] = Measured(drafting, tpf, width, seconds, tpf / seconds)
        return self.tried[drafting]


def forward_seconds(model: PreTrainedModel, length: int) -> dict[int, float]:
    """Median seconds of one decode forward over a cache of ``length`` tokens, by the number of tokens in it.

    The whole step is measured, bookkeeping included, with a draft that nothing accepts more than a token of.
    """
    seconds = {}
    with branch_attention(model), torch.inference_mode():
        for width in WIDTHS:
            mode = AUTOREGRESSIVE if width == 1 else Drafting("jacobi", width)
            taken = []
            batch = Batch(model, rows=1, slots=length + REPEATS * width + 2, widest=mode.longest)
            row = Row([0] * length, 0, mode, REPEATS * width + 2, frozenset())
            batch.join([row])
            for _ in range(REPEATS):
                begun = time.perf_counter()
                batch.step()
                taken.append(time.perf_counter() - begun)
                if row.done:
                    break
            seconds[width] = statistics.median(taken[1:] or taken)
    return seconds


def interpolate(times: dict[int, float], width: float) -> float:
    """Seconds of a forward of ``width`` tokens, linear between the measured widths and beyond the last."""
    known = sorted(times)
    upper = next((i for i, w in enumerate(known) if w >= width), len(known) - 1)
    a, b = known[max(upper - 1, 0)], known[max(upper, 1)]
    return times[a] + (times[b] - times[a]) * (width - a) / (b - a)


def stored(model: PreTrainedModel) -> Choice | None:
    """Give the choice kept beside the model for this kind of machine, or None."""
    entry = _read(model).get(machine(model))
    if entry is None:
        return _unkept.get(model, {}).get(machine(model))
    try:
        return Choice(Drafting(**entry["drafting"]), entry["explanation"], entry["speedup"])
    except (KeyError, TypeError, ValueError) as error:
        logger.warning("the calibration in %s cannot be used and is made anew: %s", kept_in(model), error)
        return None


def store(model: PreTrainedModel, choice: Choice) -> Path | None:
    """Keep the choice beside the model in one atomic step, or for this process where there is no place to write to.

    Returns:
        The file; None for this process only.
    """
    path = kept_in(model)
    if path is None:
        _unkept.setdefault(model, {})[machine(model)] = choice
        return None
    entries = _read(model)
    entries[machine(model)] = {
        "drafting": asdict(choice.drafting),
        "speedup": choice.speedup,
        "explanation": choice.explanation,
        "measured": [asdict(m) for m in choice.measured],
    }
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(entries, indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        logger.warning("the calibration is not kept, %s cannot be written: %s", path, error)
        _unkept.setdefault(model, {})[machine(model)] = choice
        return None
    return path


_unkept: WeakKeyDictionary[PreTrainedModel, dict[str, Choice]] = WeakKeyDictionary()


def machine(model: PreTrainedModel) -> str:
    """What the time of a forward depends on besides the model: processor or GPU, threads and dtype."""
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    return f"{processor()}, {torch.get_num_threads()} threads, {dtype}"


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def kept_in(model: PreTrainedModel) -> Path | None:
    """File beside the model that choices are kept in; None for a model that was not loaded from a directory."""
    directory = Path(model.name_or_path or "/nowhere")
    return directory / FILE if (directory / "config.json").is_file() else None


def _read(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    path = kept_in(model)
    if path is None or not path.is_file():
        return {}
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is made anew: %s", path, error)
        return {}
    return entries


def _explain(best: Measured, tried: dict[Drafting, Measured]) -> str:
    ar = tried[AUTOREGRESSIVE]
    if best.drafting == AUTOREGRESSIVE:
        runner = max((m for m in tried.values() if m is not ar), key=lambda m: m.tps)
        return (
            f"autoregressive: {1000 * ar.forward_s:.2f} ms a forward, {ar.tps:.0f} tokens/s; the best draft "
            f"({describe(runner.drafting)}) accepts {runner.tpf:.2f} tokens in {1000 * runner.forward_s:.2f} ms, "
            f"{runner.tps:.0f} tokens/s"
        )
    others = sorted((m for m in tried.values() if m.drafting.mode != "ar" and m is not best), key=lambda m: -m.tps)
    return (
        f"{describe(best.drafting)}: {best.tpf:.2f} tokens in a forward of {best.forward_tokens:.1f} tokens and "
        f"{1000 * best.forward_s:.2f} ms, {best.tps:.0f} tokens/s; autoregressive {1000 * ar.forward_s:.2f} ms and "
        f"{ar.tps:.0f} tokens/s, so {best.tps / ar.tps:.2f} times as fast; next best "
        f"{describe(others[0].drafting)} with {others[0].tps:.0f} tokens/s"
    )


def describe(drafting: Drafting) -> str:
    """A setting in words, with what matters in its mode."""
    if drafting.mode == "ar":
        return "autoregressive"
    if drafting.mode == "jacobi":
        return f"jacobi, block size {drafting.block_size}"
    return f"multiblock, block size {drafting.block_size}, {drafting.blocks} blocks, pool {drafting.pool}"
