"""``python -m jf_cluster chat``: a conversation in the terminal in which one sees what each forward pass wrote.

Every forward's accepted run has a background of its own, two shades in turn. Below stand tokens per forward, tokens per
second, and how that compares with autoregressive decoding of the same prompt on the same engine, of which a few
tokens are measured before every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from jf_cluster.inference.loaded import Loaded, Settings
from jf_cluster.jacobi.decoding import Generation, PromptError, stream
from jf_cluster.jacobi.drafts import AUTOREGRESSIVE
from jf_cluster.jacobi.text import TextStream

SHADES = ("black on bright_cyan", "black on bright_yellow")
AR_TOKENS = 24
"""Tokens decoded autoregressively for comparison before an answer."""


@dataclass(frozen=True)
class Answer:
    """An answer in the making: its text run by run, and what it has cost so far."""

    runs: tuple[str, ...]
    made: Generation
    ar_tps: float

    @property
    def text(self) -> str:
        return "".join(self.runs)

    def rendered(self) -> Text:
        """The text, each forward's run on its own shade; a run that wrote no text of its own shows nothing."""
        shown = Text()
        for i, run in enumerate(self.runs):
            shown.append(run, style=SHADES[i % len(SHADES)])
        return shown

    def figures(self) -> str:
        """Tokens per forward and per second, live."""
        made = self.made
        last = made.accepted_runs[-1]
        versus = f", {made.tps / self.ar_tps:.2f} times autoregressive ({self.ar_tps:.0f})" if self.ar_tps else ""
        return (
            f"{len(made.tokens)} tokens, {made.forwards} forwards, last run {last}, "
            f"{made.tpf:.2f} tokens/forward, {made.tps:.0f} tokens/s{versus}"
        )


def answers(loaded: Loaded, prompt: list[int], settings: Settings) -> Iterator[Answer]:
    """Answer one prompt; give the answer so far after every forward pass.

    Raises:
        PromptError: the conversation no longer fits the model's context.
    """
    ar_tps = measure_ar(loaded, prompt, settings)
    text = TextStream(loaded.decode, settings.stop)
    runs: list[str] = []
    pieces = stream(
        loaded.model, prompt, max_new_tokens=settings.max_new_tokens, end_ids=loaded.end_ids,
        drafting=settings.drafting, sampling=settings.sampling, key=settings.seed, stop=settings.stop,
        decode=loaded.decode,
    )  # fmt: skip
    made: Generation | None = None
    for tokens, made in pieces:
        runs.append(text.feed(tokens))
        yield Answer(tuple(runs), made, ar_tps)
    if made is not None and (rest := text.finish()):
        yield Answer((*runs[:-1], runs[-1] + rest), made, ar_tps)


def measure_ar(loaded: Loaded, prompt: list[int], settings: Settings) -> float:
    """Tokens per second of autoregressive decoding of the same prompt, over its first tokens."""
    tokens = min(AR_TOKENS, settings.max_new_tokens)
    pieces = stream(
        loaded.model, prompt, max_new_tokens=tokens, end_ids=loaded.end_ids, drafting=AUTOREGRESSIVE,
        sampling=settings.sampling, key=settings.seed,
    )  # fmt: skip
    *_, (_, made) = pieces
    return made.tps


def converse(loaded: Loaded, settings: Settings, console: Console, ask: Callable[[], str]) -> None:
    """Ask and answer until the input ends or the user types /quit; /new begins a new conversation."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            messages = []
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _show(loaded, loaded.chat(messages), settings, console)
        except PromptError as error:
            console.print(f"{error} (/new begins a new conversation)", style="red", markup=False)
            messages.pop()
            continue
        if answer is not None:
            messages.append({"role": "assistant", "content": answer.text})


def _show(loaded: Loaded, prompt: list[int], settings: Settings, console: Console) -> Answer | None:
    answer = None
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        try:
            for answer in answers(loaded, prompt, settings):
                live.update(Group(answer.rendered(), Text(answer.figures(), style="dim")), refresh=True)
        except KeyboardInterrupt:
            console.print("(interrupted)", style="dim")
    return answer
