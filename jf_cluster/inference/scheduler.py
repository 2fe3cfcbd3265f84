"""Requests into and out of one running batch: rows join when there is room, leave when done or no longer wanted.

One thread owns the model. Requests come from an asyncio loop and get their tokens back on it. Nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch

from jf_cluster.inference.loaded import Loaded
from jf_cluster.jacobi.attention import branch_attention
from jf_cluster.jacobi.decoding import PromptError, check_prompt
from jf_cluster.jacobi.drafts import Drafting, Row
from jf_cluster.jacobi.engine import Accepted, Batch
from jf_cluster.jacobi.sampling import Sampling
from jf_cluster.jacobi.text import TextStream

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """All places are taken and the queue is full."""


class StoppedError(RuntimeError):
    """The thread that owns the model has ended; nothing more will be decoded."""


@dataclass(eq=False)
class Ticket:
    """A request on its way: its row, and the tokens that have come so far."""

    row: Row
    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)
    """Tokens of each forward pass; None when the thread ended before the response did."""
    cancelled: bool = False

    def give(self, tokens: list[int] | None) -> None:
        """Hand tokens to the loop; called by the thread. A loop that is gone has nobody who waits for them."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, tokens)


class Scheduler:
    """Decodes requests of all kinds together, at most ``rows`` at a time, at most ``queue`` waiting."""

    def __init__(self, loaded: Loaded, drafting: Drafting, *, rows: int, queue: int, context_tokens: int) -> None:
        self.loaded, self.drafting, self.rows, self.queue = loaded, drafting, rows, queue
        self.context_tokens = min(context_tokens, loaded.context_tokens or context_tokens)
        self._ends = frozenset(loaded.end_ids)
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by id of the row
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def occupied(self) -> int:
        """Requests being decoded or waiting."""
        return len(self._waiting) + len(self._running)

    def submit(
        self, prompt: list[int], *, max_new_tokens: int, sampling: Sampling, key: int, stop: tuple[str, ...] = ()
    ) -> Ticket:
        """Take a request; call it on the loop that reads the ticket.

        Raises:
            PromptError, ValueError: the prompt is empty or does not fit.
            BusyError: no place and no room in the queue.
            StoppedError: the decoding thread has ended.
        """
        check_prompt(self.loaded.model, prompt, max_new_tokens)
        if len(prompt) + max_new_tokens > self.context_tokens:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"{self.context_tokens} this server allows"
            )
        text = TextStream(self.loaded.decode, stop, prompt) if stop else None
        row = Row(prompt, key, self.drafting, max_new_tokens, self._ends, sampling, text)
        ticket = Ticket(row, asyncio.get_running_loop())
        with self._changed:
            if not self.alive:
                raise StoppedError("the decoder has stopped")
            if self.occupied >= self.rows + self.queue:
                raise BusyError(f"{self.rows} requests are being answered and {self.queue} wait")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    async def tokens(self, ticket: Ticket) -> AsyncIterator[list[int]]:
        """Give a ticket's tokens as forward passes accept them; leaving the iterator early frees its place."""
        try:
            count = 0
            while not (ticket.row.done and count == len(ticket.row.tokens)):
                tokens = await ticket.arrived.get()
                if tokens is None:
                    raise StoppedError("the decoder has stopped")
                count += len(tokens)
                yield tokens
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request, whether it waits or runs; of one that is over nothing is left to give up."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread; requests that are not done fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with branch_attention(self.loaded.model), torch.inference_mode():
                batch = Batch(
                    self.loaded.model, rows=self.rows, slots=self.context_tokens, widest=self.drafting.longest
                )
                while self._turn(batch):
                    pass
        finally:
            with self._changed:
                self._stopping = True
                for ticket in (*self._running.values(), *self._waiting):
                    ticket.give(None)
                self._running.clear()
                self._waiting.clear()

    def _turn(self, batch: Batch) -> bool:
        """Let rows leave and join and make one forward pass; False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._waiting or batch.active):
                self._changed.wait()
            if self._stopping:
                return False
            given_up = [t for t in self._running.values() if t.cancelled]
            for ticket in given_up:
                del self._running[id(ticket.row)]
            batch.leave(t.row for t in given_up)
            joining = [self._waiting.popleft() for _ in range(min(batch.free, len(self._waiting)))]
            self._running.update((id(t.row), t) for t in joining)
        if joining:
            self._hand_out(batch.join([t.row for t in joining]))
        if batch.active:
            self._hand_out(batch.step())
        return True

    def _hand_out(self, accepted: Accepted) -> None:
        for row, tokens in accepted:
            ticket = self._running[id(row)]
            if row.done:
                with self._changed:
                    del self._running[id(row)]
            ticket.give(tokens)
