"""The model card of an exported model: what it is, how to decode with it, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jf_cluster.whole_files import write_whole

if TYPE_CHECKING:
    from jf_cluster.evaluate.evaluation import Evaluation

CARD = "README.md"

_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [jacobi-forcing, parallel-decoding]
{base_model}---

# {name}

A causal language model trained by Jacobi Forcing (arXiv 2512.14681){round}, from `{base}`. It is an ordinary
checkpoint: any engine runs it autoregressively. With the decoder in `custom_generate/` it writes several tokens per
forward pass, in float32 exactly those that autoregressive decoding writes.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this directory, or the model's id where it was uploaded
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
inputs = tokenizer("…", return_tensors="pt")
statistics = []
out = model.generate(
    **inputs, max_new_tokens=256, custom_generate=path, trust_remote_code=True, statistics=statistics{unpenalised}
)
print(tokenizer.decode(out[0]), statistics[0].tpf, "tokens per forward")
```

`custom_generate/` needs torch and transformers only. `drafting=` is `"ar"`, `"jacobi"`, `"multiblock"` or `"auto"`
(what a calibration stored in `decoding.json`); `block_size`, `blocks`, `spawn_ratio`, `pool`, `seed`, `stop_strings`
with `tokenizer=`, and `streamer=` work too.{why_unpenalised}

## Measured

{measured}
"""

_WHY_UNPENALISED = """

`repetition_penalty=1.0` sets aside the {penalty} that `generation_config.json` has, as the base's, for plain
generation: the decoder serves no penalties."""

_TABLE = """On {prompts} held-out prompts, in `{dtype}`; speed on {speed_prompts} of them, one request at a time,
prefill not counted, all modes on the same engine in turn. AR is the faster of this engine's and
transformers' `generate`, which took its turns too. {accuracy_note}

| model | decoding | tokens per forward | tokens per second | speed-up over AR | accuracy | same as its AR |
| --- | --- | --- | --- | --- | --- | --- |
{rows}"""


def write_card(
    directory: Path,
    *,
    base: str,
    dtype: str,
    round_number: int | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
) -> Path:
    """Write ``README.md`` into a model directory, with the measured table where ``evaluations`` (by name) are given.

    Of a base that lies on this machine only its last name is told.
    """
    local = Path(base).is_dir()
    name = Path(base).name if local else base
    penalty = _repetition_penalty(directory)
    text = _TEXT.format(
        base_model="" if local else f"base_model: {base}\n",
        name=directory.name.removesuffix(".partial"),
        round="" if round_number is None else f", round {round_number}",
        base=name,
        unpenalised="" if penalty == 1 else ",\n    repetition_penalty=1.0,",
        why_unpenalised="" if penalty == 1 else _WHY_UNPENALISED.format(penalty=penalty),
        measured=_measured(evaluations, dtype) if evaluations else "Not evaluated yet.",
    )
    card = directory / CARD
    write_whole(card, text)  # the card of a published model is replaced after its evaluation
    return card


def _repetition_penalty(directory: Path) -> float:
    """What plain generation with the model in ``directory`` uses; 1 is none."""
    settings = directory / "generation_config.json"
    return (settings.is_file() and json.loads(settings.read_text()).get("repetition_penalty")) or 1.0


def _measured(evaluations: Mapping[str, Evaluation], dtype: str) -> str:
    last = list(evaluations.values())[-1]
    lines = []
    for name, evaluation in evaluations.items():
        for mode in ("ar", "jacobi", "multiblock"):
            result = evaluation.mode(mode)
            accuracy = "not graded" if result.accuracy is None else f"{100 * result.accuracy:.1f}%"
            lines.append(
                f"| {name} | {mode} | {result.tpf:.2f} | {result.tps:.0f} | {evaluation.speedup(mode):.2f} "
                f"| {accuracy} | {100 * result.same_as_ar:.1f}% |"
            )
    return _TABLE.format(
        prompts=last.prompts,
        speed_prompts=last.speed_prompts,
        dtype=dtype,
        accuracy_note=f"Its answers agree with the base's on {100 * last.agreement_with_base:.1f}% of the prompts.",
        rows="\n".join(lines),
    )
