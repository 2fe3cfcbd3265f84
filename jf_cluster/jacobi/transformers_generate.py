"""Jacobi decoding behind transformers' own ``model.generate``.

Two ways in: ``model.generate(**inputs, custom_generate=generate)`` with the function here, and
``model.generate(**inputs, custom_generate=directory, trust_remote_code=True)`` with an exported model, whose
``custom_generate/generate.py`` is a copy of this file. Lengths, end tokens, temperature, top-k and top-p are taken from
the generation configuration as usual. What this decoder does not do is refused. To the function, though, transformers
gives neither ``streamer`` nor ``assistant_model``: use ``on_tokens`` with it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from jf_cluster.jacobi.calibration import AUTO, Auto, stored
from jf_cluster.jacobi.decoding import Generation, OnTokens
from jf_cluster.jacobi.decoding import generate as decode_batch
from jf_cluster.jacobi.drafts import JACOBI, Drafting, Mode
from jf_cluster.jacobi.sampling import GREEDY, Sampling, prompt_key
from jf_cluster.jacobi.text import Decode

OURS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MaxLengthCriteria": "max_length",
    "EosTokenCriteria": "eos_token_id",
}
"""What transformers builds from settings that are served here by other means, and the attribute that holds each."""


class UnsupportedGenerationError(ValueError):
    """Something asked of ``model.generate`` that this decoder does not do; the message says what."""


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    drafting: Drafting | Mode | Auto = AUTO,
    block_size: int | None = None,
    blocks: int | None = None,
    spawn_ratio: float | None = None,
    pool: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
    on_tokens: OnTokens | None = None,
    statistics: list[Generation] | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Write responses to ``input_ids`` (int64 [B, T], left-padded where ``attention_mask`` says so).

    Args:
        drafting: a mode, a ``Drafting``, or ``"auto"``: what a calibration stored beside the model, else Jacobi.
        block_size, blocks, spawn_ratio, pool: override that setting of ``drafting``.
        seed: of the sampling; default a number drawn from torch's own generator, so that ``torch.manual_seed`` counts.
        stop: stop strings; ``decode`` is then needed, for example ``tokenizer.decode``.
        on_tokens: called with (row, new tokens) after every forward pass.
        statistics: a list that one ``Generation`` a row is added to.

    Returns:
        Prompts and responses, int64 [B, T + longest response], padded on the right; in a ``GenerateDecoderOnlyOutput``
        with ``return_dict_in_generate``.

    Raises:
        UnsupportedGenerationError: beams, logits processors, stopping criteria or outputs this decoder does not serve.
        PromptError, UnsupportedModelError, ValueError: as in ``decoding.generate``.
    """
    if "inputs" in model_kwargs or generation_config is None:
        # Called by transformers for a directory, with the arguments as the user gave them: it prepares them itself.
        return _prepared_by_transformers(
            model, input_ids, logits_processor, stopping_criteria, generation_config,
            drafting=drafting, block_size=block_size, blocks=blocks, spawn_ratio=spawn_ratio, pool=pool, seed=seed,
            stop=stop, decode=decode, on_tokens=on_tokens, statistics=statistics, **model_kwargs,
        )  # fmt: skip
    if input_ids is None:
        raise UnsupportedGenerationError("Jacobi decoding needs input_ids")
    _refuse(generation_config, logits_processor, stopping_criteria, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    rows = [
        ids.tolist() if mask is None else ids[mask[i].bool()].tolist() for i, ids in enumerate(input_ids)
    ]  # fmt: skip
    end_ids = generation_config.eos_token_id
    ends = [end_ids] if isinstance(end_ids, int) else list(end_ids or [])
    seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
    made = decode_batch(
        model,
        rows,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        end_ids=ends,
        drafting=_drafting(model, drafting, block_size=block_size, blocks=blocks, spawn_ratio=spawn_ratio, pool=pool),
        sampling=_sampling(generation_config),
        keys=[prompt_key(seed, 0, str(i)) for i in range(len(rows))],
        stop=stop,
        decode=decode,
        on_tokens=on_tokens,
    )
    if statistics is not None:
        statistics.extend(made)
    padding = generation_config.pad_token_id
    padding = (ends[0] if ends else 0) if padding is None else padding
    longest = max(len(g.tokens) for g in made)
    written = torch.tensor([g.tokens + [padding] * (longest - len(g.tokens)) for g in made], device=input_ids.device)
    sequences = torch.cat([input_ids, written], dim=1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast("torch.LongTensor", sequences))
    return sequences


def _prepared_by_transformers(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    generation_config: GenerationConfig | None,
    **given: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    if given.get("assistant_model") is not None:
        raise UnsupportedGenerationError("Jacobi decoding needs no assistant_model: leave it out")
    tokenizer, streamer = given.pop("tokenizer", None), given.pop("streamer", None)
    inputs = given.pop("inputs", None)
    strings = given.pop("stop_strings", None) or getattr(generation_config, "stop_strings", None)
    if strings:
        if tokenizer is None:
            raise UnsupportedGenerationError("stop strings need tokenizer=")
        if generation_config is not None and generation_config.stop_strings:
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = None  # transformers would build a criterion and miss the tokenizer
        given["stop"] = [strings] if isinstance(strings, str) else strings
        given["decode"] = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    if streamer is not None:
        # transformers itself puts the prompt, but gives no streamer to a custom method.
        given["on_tokens"] = lambda row, tokens: [streamer.put(torch.tensor([token])) for token in tokens]
    result: torch.Tensor | GenerateDecoderOnlyOutput = model.generate(  # type: ignore[operator]
        inputs if input_ids is None else input_ids,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        custom_generate=generate,
        **{name: value for name, value in given.items() if value is not None},
    )
    if streamer is not None:
        streamer.end()
    return result


def _refuse(
    config: GenerationConfig,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    model_kwargs: dict[str, Any],
) -> None:
    parts = [(type(part).__name__, part) for part in [*(logits_processor or []), *(stopping_criteria or [])]]
    if foreign := sorted({name for name, _ in parts} - OURS.keys()):
        raise UnsupportedGenerationError(
            f"Jacobi decoding does not serve {', '.join(foreign)}; where the model's generation configuration asks for "
            "it, switch it off in the call, as repetition_penalty=1.0 does"
        )
    for name, part in parts:  # one that the caller made takes the place of transformers' own
        setting = OURS[name]
        if _as_set(getattr(part, setting)) != _as_set(getattr(config, setting)):
            raise UnsupportedGenerationError(f"Jacobi decoding takes no {name}: give {setting}= in its stead")
    others = ("assistant_early_exit", "dola_layers", "penalty_alpha", "prompt_lookup_num_tokens")
    if wanted := [name for name in others if getattr(config, name, None)]:
        raise UnsupportedGenerationError(f"Jacobi decoding is not decoding with {', '.join(wanted)}: leave one out")
    if (config.num_beams or 1) > 1:
        raise UnsupportedGenerationError(f"Jacobi decoding is greedy or sampled, not with num_beams={config.num_beams}")
    outputs = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if wanted := [name for name in outputs if getattr(config, name, None)]:
        raise UnsupportedGenerationError(f"Jacobi decoding gives no {', '.join(wanted)}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedGenerationError("Jacobi decoding fills a cache of its own; past_key_values must be empty")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedGenerationError("Jacobi decoding needs input_ids, not inputs_embeds")


def _as_set(value: Any) -> set[float]:
    """A setting's value, or several as of end tokens, in whatever form."""
    return set(torch.as_tensor([] if value is None else value).flatten().tolist())


def _drafting(model: PreTrainedModel, drafting: Drafting | Mode | Auto, **settings: Any) -> Drafting:
    if drafting == AUTO:
        known = stored(model)
        drafting = JACOBI if known is None else known.drafting
    kept = {} if isinstance(drafting, str) else vars(drafting)
    mode = drafting if isinstance(drafting, str) else drafting.mode
    return Drafting(**{**kept, "mode": mode, **{name: value for name, value in settings.items() if value is not None}})


def _sampling(config: GenerationConfig) -> Sampling:
    if not config.do_sample:
        return GREEDY

    def given(value: Any, default: float) -> Any:
        return default if value is None else value

    return Sampling(given(config.temperature, 1.0), given(config.top_k, 0), given(config.top_p, 1.0))
