"""``python -m jf_cluster chat``: a conversation in the terminal in which one sees what each forward pass wrote.

Every forward's accepted run has a background of its own, two shades in turn. Below stand tokens per forward, tokens per
second, and how that compares with autoregressive decoding of the same prompt on the same engine, of which a few
tokens are measured before every answer. A line that is full is printed and not touched again: what a forward costs
here does not depend on how long the answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from jinja2 import TemplateError
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
WARM_UPS = 2
"""First forwards of a response that its rate leaves out, AR's and ours alike: libraries choose kernels in them and on
a GPU graphs are recorded."""


@dataclass(frozen=True)
class Run:
    """What one forward pass made certain of an answer's text, and what the answer has cost so far."""

    text: str
    made: Generation
    tps: float
    ar_tps: float

    def figures(self) -> str:
        """Tokens per forward and per second, live."""
        made = self.made
        last = made.accepted_runs[-1]
        rate = f", {self.tps:.0f} tokens/s" if self.tps else ""
        if self.tps and self.ar_tps:
            rate += f", {self.tps / self.ar_tps:.2f} times autoregressive ({self.ar_tps:.0f})"
        return (
            f"{len(made.tokens)} tokens, {made.forwards} forwards, last run {last}, {made.tpf:.2f} tokens/forward{rate}"
        )


class Rate:
    """Tokens per second of one response, of the time spent in forwards after the first ``WARM_UPS``."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def after(self, made: Generation) -> float:
        """The rate so far; call it after every forward. 0 as long as nothing is measured."""
        if made.forwards <= WARM_UPS:
            self._tokens, self._seconds = len(made.tokens), made.seconds
        seconds = made.seconds - self._seconds
        return (len(made.tokens) - self._tokens) / seconds if seconds else 0.0


def answers(loaded: Loaded, prompt: list[int], settings: Settings) -> Iterator[Run]:
    """Answer one prompt run by run, one for each forward pass; text that was withheld to the end comes in one more.

    Raises:
        PromptError: the conversation no longer fits the model's context.
    """
    ar_tps = measure_ar(loaded, prompt, settings)
    text, rate, tps = TextStream(loaded.decode, settings.stop, prompt), Rate(), 0.0
    pieces = stream(
        loaded.model, prompt, max_new_tokens=settings.max_new_tokens, end_ids=loaded.end_ids,
        drafting=settings.drafting, sampling=settings.sampling, key=settings.seed, stop=settings.stop,
        decode=loaded.decode,
    )  # fmt: skip
    made: Generation | None = None
    for tokens, made in pieces:
        tps = rate.after(made)
        yield Run(text.feed(tokens), made, tps, ar_tps)
    if made is not None and (rest := text.finish()):
        yield Run(rest, made, tps, ar_tps)


def measure_ar(loaded: Loaded, prompt: list[int], settings: Settings) -> float:
    """Tokens per second of autoregressive decoding of the same prompt, over its first tokens."""
    pieces = stream(
        loaded.model, prompt, max_new_tokens=min(AR_TOKENS, settings.max_new_tokens), end_ids=loaded.end_ids,
        drafting=AUTOREGRESSIVE, sampling=settings.sampling, key=settings.seed,
    )  # fmt: skip
    rate, tps = Rate(), 0.0
    for _, made in pieces:
        tps = rate.after(made)
    return tps


class Screen:
    """An answer on the terminal: full lines are printed once; the line being written and the figures stay live."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._line = Text()
        self._shade, self._forwards = 0, -1

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, run: Run) -> None:
        """Add a run; one without text of its own shows nothing and takes no shade."""
        if run.text and run.made.forwards != self._forwards:
            self._shade, self._forwards = 1 - self._shade, run.made.forwards
        self._line.append(run.text, style=SHADES[self._shade])
        *full, self._line = self._line.wrap(self._console, self._console.width, overflow="fold") or [Text()]
        with self._console:  # written at once, so that nothing flickers
            if full:
                self._console.print(Text("\n").join(full))
            self._live.update(Group(self._line, Text(run.figures(), style="dim")), refresh=True)


def converse(loaded: Loaded, settings: Settings, console: Console, ask: Callable[[], str]) -> None:
    """Ask and answer until the input ends or the user types /quit; /new begins a new conversation.

    A question that got no answer, because it was refused or interrupted before the first token, is forgotten.
    """
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
        answer = None
        try:
            answer = _show(loaded, loaded.chat(messages), settings, console)
        except PromptError as error:
            console.print(f"{error} (/new begins a new conversation)", style="red", markup=False)
        except TemplateError as error:
            console.print(f"the model's chat template refuses it: {error}", style="red", markup=False)
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _show(loaded: Loaded, prompt: list[int], settings: Settings, console: Console) -> str | None:
    """Show the answer while it is made; give its text, None where it was interrupted before any of it was there."""
    texts: list[str] = []
    try:
        with Screen(console) as screen:
            for run in answers(loaded, prompt, settings):
                texts.append(run.text)
                screen.show(run)
    except KeyboardInterrupt:
        console.print("(interrupted)", style="dim")
    return "".join(texts) if texts else None
