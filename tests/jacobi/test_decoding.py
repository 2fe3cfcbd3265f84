"""Every decoding mode gives exactly what AR gives, greedy and sampled, single and batched."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from jf_cluster.jacobi import engine
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.cache import KeyValueCache
from jf_cluster.jacobi.decoding import PromptError, generate, stream
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE, Drafting, NgramPool, Row
from jf_cluster.jacobi.engine import Batch
from jf_cluster.jacobi.oracle import autoregressive
from jf_cluster.jacobi.sampling import GREEDY, Sampling
from jf_cluster.jacobi.support import UnsupportedModelError

from .conftest import END, make_model, oracle_responses, random_prompts

DRAFTINGS = (
    AUTOREGRESSIVE,
    Drafting("jacobi", 8),
    Drafting("multiblock", 8, blocks=2, spawn_ratio=0.5, pool=4),
    Drafting("multiblock", 6, blocks=3, spawn_ratio=0.0, pool=2),
    Drafting("multiblock", 4, blocks=1, pool=0),
    Drafting("multiblock", 5, blocks=2, pool=3, gram=7),
)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.9, top_k=10, top_p=0.9)], ids=str)
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
def test_every_mode_equals_ar(model: PreTrainedModel, drafting: Drafting, sampling: Sampling) -> None:
    prompts = random_prompts([5, 9, 1, 14])
    expected = oracle_responses(model, prompts, 37, sampling)
    batch = generate(
        model, [p.tolist() for p in prompts], max_new_tokens=37, end_ids=[END], drafting=drafting, sampling=sampling
    )
    assert [g.tokens for g in batch] == expected
    for i, prompt in enumerate(prompts):
        (single,) = generate(
            model, [prompt.tolist()], max_new_tokens=37, end_ids=[END], drafting=drafting, sampling=sampling, keys=[i]
        )
        assert single.tokens == expected[i]
        # A row's drafts depend on the row alone, so neither do its forwards depend on the batch.
        assert single.accepted_runs == batch[i].accepted_runs
        assert sum(single.accepted_runs) == len(expected[i])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    block_size=st.integers(1, 12),
    blocks=st.integers(1, 3),
    spawn_ratio=st.floats(0, 1, allow_subnormal=False),  # CPU workers flush them, and so may this process
    pool=st.integers(0, 4),
    gram=st.integers(1, 8),
    limit=st.integers(1, 40),
    mode=st.sampled_from(["jacobi", "multiblock"]),
)
def test_any_options_equal_ar(seed, lengths, block_size, blocks, spawn_ratio, pool, gram, limit, mode) -> None:
    model = make_model("qwen2", seed % 3)
    prompts = random_prompts(lengths, seed)
    drafting = Drafting(mode, block_size, blocks, spawn_ratio, pool, gram)
    got = generate(model, [p.tolist() for p in prompts], max_new_tokens=limit, end_ids=[END], drafting=drafting)
    assert [g.tokens for g in got] == oracle_responses(model, prompts, limit)


@pytest.mark.parametrize("drafting", [AUTOREGRESSIVE, Drafting("jacobi", 3)], ids=str)
def test_more_rows_than_slots(qwen2: PreTrainedModel, drafting: Drafting) -> None:
    prompts = random_prompts([2] * 40)
    made = generate(qwen2, [p.tolist() for p in prompts], max_new_tokens=4, end_ids=[END], drafting=drafting)
    assert [g.tokens for g in made] == oracle_responses(qwen2, prompts, 4)


def test_ar_is_one_token_a_forward_and_parallel_modes_are_counted_alike(qwen2: PreTrainedModel) -> None:
    prompts = [p.tolist() for p in random_prompts([5, 9])]
    for drafting in (AUTOREGRESSIVE, Drafting("multiblock", 8, pool=4)):
        for g in generate(qwen2, prompts, max_new_tokens=30, end_ids=[END], drafting=drafting):
            assert g.forwards == len(g.accepted_runs) - 1
            assert g.tpf == pytest.approx((len(g.tokens) - 1) / g.forwards)
            assert drafting.mode != "ar" or g.tpf == 1.0


def test_tokens_stream_in_order(qwen2: PreTrainedModel) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    got = generate(
        qwen2,
        [p.tolist() for p in random_prompts([5, 9])],
        max_new_tokens=30,
        end_ids=[END],
        drafting=Drafting("jacobi", 8),
        on_tokens=lambda row, tokens: seen[row].extend(tokens),
    )
    assert [seen[0], seen[1]] == [g.tokens for g in got]


class Calls(TorchDispatchMode):
    """Names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("source", "apart"), [(9, True), (6, True), (4, False), (5, False)])
def test_accepted_slots_are_copied_in_place(qwen2: PreTrainedModel, source: int, apart: bool) -> None:
    cache = KeyValueCache(qwen2.config, 2, 12, dtype=torch.float32, device=torch.device("cpu"))
    tensors = [*cache.keys, *cache.values]
    for tensor in tensors:
        tensor.normal_()
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        tensor[1, :, 3:6] = tensor[1, :, source : source + 3].clone()
    with Calls() as calls:
        cache.copy_slots(1, slice(source, source + 3), slice(3, 6))
    assert all(map(torch.equal, tensors, expected))
    assert calls.names.count("copy_") == len(tensors) and ("clone" in calls.names) != apart


def test_several_end_tokens(qwen2: PreTrainedModel) -> None:
    prompts = random_prompts([6])
    (whole,) = oracle_responses(qwen2, prompts, 30)
    end = whole[4]
    got = generate(qwen2, [prompts[0].tolist()], max_new_tokens=30, end_ids=[END, end], drafting=Drafting("jacobi", 8))[
        0
    ]
    assert got.tokens == whole[: whole.index(end) + 1] and got.finished


def spell(tokens: list[int]) -> str:
    """A toy vocabulary's text: one or two letters a token, so that a stop string may begin inside of one."""
    return "".join(chr(97 + t % 7) + (chr(97 + t % 5) if t % 2 else "") for t in tokens)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), at=st.integers(0, 20), length=st.integers(1, 4), pool=st.integers(0, 3))
def test_stop_strings_end_every_mode_at_the_same_token(seed: int, at: int, length: int, pool: int) -> None:
    model = make_model("qwen2", seed % 3)
    prompts = random_prompts([4, 9], seed)
    whole = oracle_responses(model, prompts, 30)
    stop = spell(whole[0])[at : at + length] or "a"
    expected = []
    for tokens in whole:
        written = [t for t in tokens if t != END]  # the end token writes no text
        ends = [i for i in range(1, len(written) + 1) if stop in spell(written[:i])]
        expected.append((written[: ends[0]], stop) if ends else (tokens, None))
    options = {"max_new_tokens": 30, "end_ids": [END], "stop": ["never", stop], "decode": spell}
    for drafting in (AUTOREGRESSIVE, Drafting("jacobi", 8), Drafting("multiblock", 6, spawn_ratio=0.5, pool=pool)):
        got = generate(model, [p.tolist() for p in prompts], drafting=drafting, **options)
        assert [(g.tokens, g.stop) for g in got] == expected


def test_a_stream_gives_what_generate_gives_and_leaves_the_model_as_it_was(qwen2: PreTrainedModel) -> None:
    prompt = random_prompts([7])[0].tolist()
    before = qwen2.config._attn_implementation
    options = {"max_new_tokens": 25, "end_ids": [END], "drafting": Drafting("multiblock", 6)}
    (whole,) = generate(qwen2, [prompt], **options)
    pieces = list(stream(qwen2, prompt, **options))
    assert [len(tokens) for tokens, _ in pieces] == whole.accepted_runs
    assert [t for tokens, _ in pieces for t in tokens] == whole.tokens == pieces[-1][1].tokens
    abandoned = stream(qwen2, prompt, **options)
    next(abandoned)
    assert not torch.is_inference_mode_enabled()  # the reader's own code is not run in inference mode
    abandoned.close()
    assert qwen2.config._attn_implementation == before


def test_streams_of_one_model_may_be_read_in_turns(qwen2: PreTrainedModel) -> None:
    before = qwen2.config._attn_implementation
    prompts = random_prompts([7, 12])
    sizes = (10, 30)
    expected = [
        autoregressive(qwen2, p.tolist(), max_new_tokens=n, end_ids=[]) for p, n in zip(prompts, sizes, strict=True)
    ]
    streams = [stream(qwen2, p.tolist(), max_new_tokens=n, end_ids=[]) for p, n in zip(prompts, sizes, strict=True)]
    written: list[list[int]] = [[], []]
    for pieces in zip_longest(*streams):
        for i, piece in enumerate(pieces):
            written[i] += piece[0] if piece else []
    assert written == expected
    assert qwen2.config._attn_implementation == before


def test_a_stream_that_is_over_leaves_the_next_ones_batch_alone(
    qwen2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the batch is kept for the next call, here without recording graphs."""
    monkeypatch.setattr("jf_cluster.jacobi.engine.Batch", partial(Batch, static=True))
    monkeypatch.setattr("jf_cluster.jacobi.engine._kept", WeakKeyDictionary())
    first, second = random_prompts([7, 7])
    (expected,) = oracle_responses(qwen2, [second], 12)
    over = stream(qwen2, first.tolist(), max_new_tokens=4, end_ids=[])
    while len(next(over)[1].tokens) < 4:
        pass
    after = stream(qwen2, second.tolist(), max_new_tokens=12, end_ids=[END])
    written = next(after)[0]
    assert next(over, None) is None
    assert written + [token for tokens, _ in after for token in tokens] == expected


def test_a_kept_batch_keeps_no_model_and_serves_no_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jf_cluster.jacobi.engine.Batch", partial(Batch, static=True))
    model = make_model("llama")

    def kept(model: PreTrainedModel) -> Batch:
        generate(model, [[1, 2, 3]], max_new_tokens=4, end_ids=[END])
        return engine._kept[model]

    first = kept(model)
    assert kept(model) is first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # a recorded graph has the old one
    assert kept(model) is not first
    alive = weakref.ref(model)
    del first, model
    gc.collect()
    assert alive() is None and len(engine._kept) == 0


def test_the_cost_of_a_response_adds_up(qwen2: PreTrainedModel) -> None:
    prompts = [p.tolist() for p in random_prompts([5, 9])]
    for g in generate(qwen2, prompts, max_new_tokens=30, end_ids=[END], drafting=Drafting("jacobi", 8)):
        assert sum(length * count for length, count in g.run_histogram.items()) == len(g.tokens) - 1
        assert sum(g.run_histogram.values()) == g.forwards
        assert g.forwards < g.forwarded_tokens <= 8 * g.forwards
        assert g.reason == ("end" if g.tokens[-1] == END else "length")
        assert g.prefill_seconds > 0 and g.tps == pytest.approx((len(g.tokens) - 1) / g.seconds)


def test_the_time_a_reader_takes_between_forwards_is_not_decoding(
    qwen2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("jf_cluster.jacobi.engine.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def a_second(*_: object) -> None:
        now[0] += 1.0

    handle = qwen2.register_forward_hook(a_second)  # decode forwards only: the prefill calls the base model
    try:
        for _, made in stream(qwen2, [1, 2, 3], max_new_tokens=20, end_ids=[END], drafting=Drafting("jacobi", 4)):
            assert made.seconds == made.forwards
            now[0] += 100.0
    finally:
        handle.remove()
    assert made.tps == made.tpf


def test_rows_join_and_leave_while_others_run(qwen2: PreTrainedModel) -> None:
    """What a server does: requests come and go, each in its own mode and sampling, and none sees the others."""
    prompts = random_prompts([5, 9, 3, 12, 7])
    kinds = [Sampling(0.8), GREEDY, Sampling(0.9, top_k=8), GREEDY, GREEDY]
    modes = [Drafting("jacobi", 5), AUTOREGRESSIVE, Drafting("multiblock", 4), Drafting("jacobi", 8), AUTOREGRESSIVE]
    rows = [
        Row(p.tolist(), i, drafting, 25, frozenset([END]), sampling)
        for i, (p, drafting, sampling) in enumerate(zip(prompts, modes, kinds, strict=True))
    ]
    with branch_attention(qwen2), torch.inference_mode():
        batch = Batch(qwen2, rows=3, slots=40, widest=32)
        batch.join(rows[:2])
        batch.step()
        batch.join(rows[2:3])
        with pytest.raises(ValueError, match="0 of 3 places are free"):
            batch.join(rows[3:4])
        batch.step()
        if not rows[0].done:
            batch.leave([rows[0]])
        waiting = rows[3:]
        while batch.active or waiting:
            if waiting and batch.free:
                batch.join([waiting.pop(0)])
            if batch.active:
                batch.step()
    for i, row in enumerate(rows):
        (expected,) = [
            autoregressive(qwen2, row.prompt, max_new_tokens=25, end_ids=[END], sampling=row.sampling, key=i)
        ]
        assert row.tokens == expected[: len(row.tokens)] and (row.tokens == expected or i == 0)


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
def test_static_shapes_give_the_same(model: PreTrainedModel, drafting: Drafting, monkeypatch) -> None:
    """The steps that run as CUDA graphs, here without being recorded: few shapes, and exactly AR's tokens."""
    monkeypatch.setattr("jf_cluster.jacobi.engine.SMALLEST_BUCKET", 32)
    prompts = random_prompts([5, 9, 14])
    rows = [Row(p.tolist(), i, drafting, 40, frozenset([END])) for i, p in enumerate(prompts)]
    with branch_attention(model), torch.inference_mode():
        batch = Batch(model, rows=3, slots=60, widest=drafting.longest, static=True)
        batch.join(rows)
        while batch.active:
            batch.step()
    assert [r.tokens for r in rows] == oracle_responses(model, prompts, 40)
    # One shape for each doubling of the cache's length, however many rows are left.
    assert batch._graphs is not None and batch._graphs.count <= 2


def test_bad_input_is_refused_before_any_work(qwen2: PreTrainedModel) -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        generate(qwen2, [[1], []], max_new_tokens=5, end_ids=[END])
    with pytest.raises(PromptError, match="context of 256"):
        generate(qwen2, [[1] * 250], max_new_tokens=7, end_ids=[END])
    with pytest.raises(ValueError, match="unknown decoding mode 'warp'"):
        Drafting("warp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop strings need decode="):
        generate(qwen2, [[1]], max_new_tokens=5, end_ids=[END], stop=["x"])
    with pytest.raises(ValueError, match="a stop string is empty"):
        generate(qwen2, [[1]], max_new_tokens=5, end_ids=[END], stop=[""], decode=spell)
    with pytest.raises(PromptError, match="is empty"):
        stream(qwen2, [], max_new_tokens=5, end_ids=[END])  # before the first token is asked for
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="over a key-value cache"):
        generate(recurrent, [[1]], max_new_tokens=5, end_ids=[END])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        generate(t5, [[1]], max_new_tokens=5, end_ids=[END])


def test_the_pool_keeps_the_newest_runs() -> None:
    pool = NgramPool(per_token=2, length=3)
    pool.add([1, 2, 3, 4, 5])
    pool.add([1, 9, 9])
    pool.add([1, 8])
    assert pool.find(1) == [(8,), (9, 9)]
    assert pool.find(2) == [(3, 4, 5)]
    assert pool.find(7) == []
