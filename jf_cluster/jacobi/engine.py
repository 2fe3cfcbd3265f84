"""Forward passes of rows that are decoded together over one preallocated key-value cache.

Rows join and leave between forward passes; active rows always lie first in the cache. A row forwards its last
accepted token, its draft and its recycled candidates; the candidates are branches off the same cache, not copies of
it. What a row proposes and accepts is in ``drafts.py``, the call people make is in ``decoding.py``.

Per forward pass the host sends what is proposed and reads what the model chose. On a GPU that is a copy into a buffer
that is there and a replayed graph (``graphs.py``), nothing is allocated. Without graphs a single request makes nothing
anew whose size grows with what was written before; a batch makes the mask that attention needs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.cache import KeyValueCache, aligned
from jf_cluster.jacobi.drafts import Row
from jf_cluster.jacobi.graphs import Graphs
from jf_cluster.jacobi.layout import CachedRows, visible
from jf_cluster.jacobi.sampling import IntArray, Sampling, most_likely
from jf_cluster.jacobi.support import output_head

Accepted = list[tuple[Row, list[int]]]
"""Rows and the tokens a forward pass added to each."""


class Batch:
    """Up to ``rows`` rows at a time, each of at most ``slots`` tokens, prompt and response together.

    ``widest`` is the most tokens a row may propose. The model must be under ``attention.branch_attention`` and
    gradients off whenever rows join or a step is made. ``static`` steps have the same shapes whatever is proposed and
    run as CUDA graphs, AR's and ours alike; by default on a GPU, for few rows, where launching from Python takes the
    time.
    """

    def __init__(
        self, model: PreTrainedModel, *, rows: int, slots: int, widest: int, static: bool | None = None
    ) -> None:
        self._model = weakref.ref(model)  # a batch that is kept for the next call does not keep the model
        self.capacity, self.slots, self.widest = rows, slots, widest
        self.cache = KeyValueCache(model.config, rows, slots + widest, dtype=model.dtype, device=model.device)
        self.active: list[Row] = []
        """Rows being decoded; row i lies in cache row i."""
        self._numbers = torch.arange(max(self.cache.slots, rows), device=model.device)
        self._written = slice(0, 0)  # columns of the single row's mask that are not zero
        static = model.device.type == "cuda" and rows <= GRAPH_ROWS if static is None else static
        self._graphs = Graphs(self._packed_forward, model.device) if static else None
        self._head = output_head(model)
        self._weights = _addresses(model)

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "whoever decodes holds the model"
        return model

    @property
    def free(self) -> int:
        """Rows that may still join."""
        return self.capacity - len(self.active)

    @property
    def static(self) -> bool:
        return self._graphs is not None

    def serves(self, rows: int, slots: int, widest: int) -> bool:
        """Whether this batch, idle, has the place for other rows and the model's weights are where they were."""
        roomy = rows == self.capacity and slots <= self.slots and widest <= self.widest
        return roomy and not self.active and self._weights == _addresses(self.model)

    def join(self, rows: Sequence[Row]) -> Accepted:
        """Prefill ``rows`` in one forward pass and give each one's first token; rows done with it do not stay."""
        if len(rows) > self.free:
            raise ValueError(f"{len(rows)} rows do not fit: {self.free} of {self.capacity} places are free")
        for r in rows:
            if len(r.prompt) + r.max_new_tokens > self.slots:
                raise ValueError(f"a row of {len(r.prompt)} + {r.max_new_tokens} tokens is too long for {self.slots}")
            if r.drafting.longest > self.widest:
                raise ValueError(f"{r.drafting} proposes {r.drafting.longest} tokens, more than {self.widest}")
        begun = time.perf_counter()
        lengths = np.array([len(r.prompt) for r in rows])
        width, count = int(lengths.max()), len(rows)
        tokens = np.zeros((count, width), dtype=np.int64)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = row.prompt
        layout = CachedRows(
            self.cache, None, None, mask=None, reach=width, causal=True, first_row=len(self.active), first_slot=0
        )
        base = self.model.base_model(
            input_ids=self._tensor(tokens),
            position_ids=self._numbers[:width].expand(count, width),
            use_cache=False,
            layout=layout,
        )
        last = base.last_hidden_state[torch.arange(count), self._tensor(lengths - 1)]
        firsts = self._choose(self._head(last), list(rows), np.zeros((count, 1), dtype=np.int64))
        ended = time.perf_counter()
        for row, first in zip(rows, firsts, strict=True):
            row.prefill_seconds = ended - begun
            row.begin(first)
        self.active += rows
        self.leave(r for r in rows if r.done)
        return [(r, r.tokens[:]) for r in rows]

    def step(self) -> Accepted:
        """Make one forward pass of all active rows; rows that are done leave."""
        begun, rows = time.perf_counter(), self.active
        before = [len(r.tokens) for r in rows]
        single = len(rows) == 1 and self._graphs is None
        chosen = self._forward_one(rows[0]) if single else self._forward_all(rows)
        for i, (row, written) in enumerate(zip(rows, chosen, strict=True)):
            self._accept(i, row, written)
        seconds = time.perf_counter() - begun
        for row in rows:
            row.elapsed += seconds
        accepted = [(r, r.tokens[b:]) for r, b in zip(rows, before, strict=True)]
        self.leave(r for r, _ in accepted if r.done)
        return accepted

    def leave(self, rows: Iterable[Row]) -> None:
        """Take rows out; the last active row moves into each freed place, so that active rows stay first."""
        for row in list(rows):
            i = next(i for i, r in enumerate(self.active) if r is row)
            moved = self.active.pop()
            if i < len(self.active):
                self.active[i] = moved
                self.cache.copy_row(len(self.active), i)

    def _forward_one(self, row: Row) -> list[list[int]]:
        """The usual case, one request: its tokens fill consecutive slots, so little is to be said about them."""
        proposed = row.proposed
        last, width = row.last_slot, len(proposed)
        positions = self._numbers[last : last + width]
        mask: torch.Tensor | None = None
        if row.candidates:
            positions = last + self._tensor(row.depths)
            mask = self._mask_of_one(last, self._branches(row))
        elif width > 1:
            mask = self._mask_of_one(last, self._triangle[:width, :width])
        reach = last + width if mask is None else mask.shape[-1]
        layout = CachedRows(self.cache, None, None, mask=mask, reach=reach, first_slot=last)
        logits = self._logits(torch.tensor([proposed], device=self.model.device), positions[None], layout)
        if row.sampling.temperature == 0:
            return [most_likely(logits[0]).tolist()]
        return [self._choose(logits[0], [row], len(row.tokens) + row.depths[None])]

    def _branches(self, row: Row) -> torch.Tensor:
        """Who of the proposed tokens sees whom, to be added to the scores, [Q, Q]; all see the last accepted one."""
        own = row.own_ranges[1]
        number = np.arange(len(own))
        seen = (number >= own[:, None]) & (number <= number[:, None]) | (number == 0)
        return self._tensor(np.where(seen, 0.0, -np.inf)).to(self.model.dtype)

    def _mask_of_one(self, last: int, own: torch.Tensor) -> torch.Tensor:
        """[1, 1, Q, reach]: all before slot ``last`` is seen, and the proposed tokens see each other as in ``own``.

        Written into one buffer that is kept zero elsewhere: a mask made anew would cost more the longer the response.
        """
        width, end = len(own), last + len(own)
        self._mask[:, self._written] = 0
        self._written = slice(last, aligned(end))
        self._mask[:width, last:end] = own
        self._mask[:width, end : self._written.stop] = -torch.inf
        return self._mask[None, None, :width, : self._written.stop]

    @cached_property
    def _mask(self) -> torch.Tensor:
        return torch.zeros((self.widest, self.cache.slots), dtype=self.model.dtype, device=self.model.device)

    @cached_property
    def _triangle(self) -> torch.Tensor:
        whole = torch.full((self.widest, self.widest), -torch.inf, dtype=self.model.dtype, device=self.model.device)
        return whole.triu(1)

    def _forward_all(self, rows: Sequence[Row]) -> list[list[int]]:
        """Any rows; also the static shapes that CUDA graphs need, where all that changes is ``packed``."""
        last = np.array([r.last_slot for r in rows])
        count, width = len(rows), max(len(r.proposed) for r in rows)
        reach = aligned(int(last.max()) + width)
        if self._graphs is not None:
            count, width = self.capacity, max(r.drafting.longest for r in rows)  # rows beyond the active ones idle
            reach = min(_bucket(int(last.max()) + width), self.cache.slots)
            buffer = self._graphs.host(5, count, width)
        else:
            buffer = torch.empty((5, count, width), dtype=torch.int64)
        # Tokens, slots, positions, end of the stem and begin of the own branch. Unused places have no position of their
        # own: some models turn every token by other angles when there is one past their context (dynamic, longrope).
        packed = buffer.numpy()
        packed[:] = 0
        packed[1:, : len(rows)] = last[:, None]
        packed[1] += np.arange(width)
        for i, r in enumerate(rows):
            size = len(r.proposed)
            packed[0, i, :size] = r.proposed
            packed[2, i, :size] = last[i] + r.depths
            packed[3:, i, :size] += r.own_ranges
        places = packed[2, : len(rows)] - last[:, None] + np.array([len(r.tokens) for r in rows])[:, None]
        if self._graphs is not None:
            logits, likeliest = self._graphs.run(buffer, reach)
        else:
            logits, likeliest = self._packed_forward(buffer.to(self.model.device), reach)
        if all(r.sampling.temperature == 0 for r in rows):
            chosen = likeliest[: len(rows)].flatten().tolist()
        else:
            chosen = self._choose(logits[: len(rows)].flatten(0, 1), rows, places)
        return [chosen[i * width : i * width + len(r.proposed)] for i, r in enumerate(rows)]

    def _packed_forward(self, packed: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, Q, V] and argmax [B, Q] of ``packed`` int64 [5, B, Q]; device work only, for graphs to record."""
        tokens, slots, positions, stem_end, own = packed
        count, width = tokens.shape
        mask = visible(
            torch.zeros_like(stem_end)[:, :, None],
            stem_end[:, :, None],
            own[:, :, None],
            slots[:, :, None],
            self._numbers[:reach],
        )
        layout = CachedRows(
            self.cache,
            self._numbers[:count].repeat_interleave(width, output_size=count * width),
            slots.flatten(),
            mask=mask[:, None],
            reach=reach,
        )
        logits = self._logits(tokens, positions, layout)
        return logits, most_likely(logits)

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor, layout: CachedRows) -> torch.Tensor:
        """Logits [B, Q, V] of tokens and positions [B, Q]."""
        out = self.model(input_ids=tokens, position_ids=positions, use_cache=False, layout=layout)
        logits: torch.Tensor = out.logits
        return logits

    def _accept(self, i: int, row: Row, written: Sequence[int]) -> None:
        at, after, starts = 1 + len(row.draft), [], []
        for c in row.candidates:
            starts.append(at)
            after.append(written[at : at + len(c)])
            at += len(c)
        last = row.last_slot
        run, source = row.advance(written[: 1 + len(row.draft)], after)
        if source is not None:
            first = last + starts[source]
            self.cache.copy_slots(i, slice(first, first + run), slice(last + 1, last + 1 + run))

    def _choose(self, logits: torch.Tensor, rows: Sequence[Row], places: IntArray) -> list[int]:
        """Next tokens for logits [B * Q, V]; ``places`` [B, Q] are the response positions they are for."""
        kinds = {r.sampling for r in rows}
        if len(kinds) == 1 and (only := next(iter(kinds))).temperature == 0:
            greedy: list[int] = most_likely(logits).tolist()
            return greedy
        width = places.shape[1]
        keys = self._tensor(np.repeat(np.array([r.key for r in rows], dtype=np.int64), width))
        positions = self._tensor(places.ravel())
        if len(kinds) == 1:
            sampled: list[int] = only.choose(logits, keys, positions).tolist()
            return sampled
        chosen = torch.empty_like(keys)
        for kind in kinds:
            mine = self._tensor(_places_of(kind, rows, width))
            chosen[mine] = kind.choose(logits[mine], keys[mine], positions[mine])
        mixed: list[int] = chosen.tolist()
        return mixed

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.model.device)


def decode_rows(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[tuple[int, list[int]]]:
    """Decode all rows to their end; give (row number, new tokens) after every forward pass.

    The model keeps its branch attention until the iterator is exhausted or closed.
    """
    if not rows:
        return
    numbers = {id(row): number for number, row in enumerate(rows)}
    slots = max(len(r.prompt) + r.max_new_tokens for r in rows)
    with branch_attention(model):
        with torch.inference_mode():
            batch = _batch_for(model, len(rows), slots, max(r.drafting.longest for r in rows))
            accepted = batch.join(rows)
        while accepted:
            # Not inside inference mode: whoever reads the iterator goes on in between.
            yield from ((numbers[id(row)], tokens) for row, tokens in accepted)
            with torch.inference_mode():
                # Once these rows are done the batch may be another call's.
                accepted = [] if all(row.done for row in rows) else batch.step()


def _addresses(model: PreTrainedModel) -> list[int]:
    """Where everything lies that a recorded graph reads of a model."""
    return [tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())]


_kept: WeakKeyDictionary[PreTrainedModel, Batch] = WeakKeyDictionary()
"""On a GPU the last batch, for the next call with that model: recording graphs takes longer than many a response."""


def _batch_for(model: PreTrainedModel, rows: int, slots: int, widest: int) -> Batch:
    kept = _kept.get(model)
    if kept is not None and kept.serves(rows, slots, widest):
        return kept
    batch = Batch(model, rows=rows, slots=slots, widest=widest)
    if batch.static:
        _kept.clear()
        _kept[model] = batch
    return batch


GRAPH_ROWS = 8
SMALLEST_BUCKET = 256


def _bucket(slots: int) -> int:
    """Key slots a static step attends over: the next power of two, so that there are few graphs."""
    return max(SMALLEST_BUCKET, 1 << (slots - 1).bit_length())


def _places_of(kind: Sampling, rows: Sequence[Row], width: int) -> IntArray:
    """Indices into [B * width] of the rows that sample alike."""
    mine = np.array([i for i, r in enumerate(rows) if r.sampling == kind])
    places: IntArray = (mine[:, None] * width + np.arange(width)).ravel()
    return places
