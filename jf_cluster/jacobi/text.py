"""From a response's tokens to its text, whole or while they arrive: incremental decoding and stop strings.

A response's text is handed out as soon as it cannot change any more. Withheld are the bytes of an unfinished
character and a tail that may be the beginning of a stop string. The work per token does not depend on how much was
written before. No tokenizer is imported here; ``decode`` is any tokenizer's way from ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Text of token ids, for example ``functools.partial(tokenizer.decode, skip_special_tokens=True)``."""

UNFINISHED = "\ufffd"
"""What tokenizers give for bytes that are not a whole character yet."""
LONGEST_CHARACTER_TOKENS = 8
"""A character has at most four bytes, hence tokens; what is still unfinished after more tokens never will be."""
CONTEXT_TOKENS = 8
"""So many of a prompt's last tokens are decoded with its response; special tokens among them may write nothing."""


def decode_behind(decode: Decode, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of ``tokens`` as it reads behind ``prompt``.

    Decoded on their own, a SentencePiece tokenizer would take their first space for the one it puts before every text.
    """
    context = _context(decode, prompt)
    return decode([*context, *tokens])[len(decode(context)) :]


def pieces(decode: Decode, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[str, ...]:
    """Text of each of ``tokens`` as it reads behind those before it; a part of a character is UNFINISHED."""
    whole = [*prompt, *tokens]
    return tuple(decode_behind(decode, whole[:i], whole[i : i + 1]) for i in range(len(prompt), len(whole)))


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens; none where it ends within a character, which a response could complete."""
    last = list(prompt[-CONTEXT_TOKENS:])
    return [] if decode(last).endswith(UNFINISHED) else last


class TextStream:
    """Text of one response, token by token, up to the first of ``stop`` that appears in it."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), behind: Sequence[int] = ()) -> None:
        """Begin a response to the prompt ``behind``, whose text is not given; see ``decode_behind``.

        Raises:
            ValueError: a stop string is empty, which would stop every response before its first character.
        """
        if any(not s for s in stop):
            raise ValueError("a stop string is empty")
        self.stopped: str | None = None
        """The stop string that was found; tokens after it are ignored."""
        self._decode, self._stop = decode, tuple(stop)
        self._window = _context(decode, behind)  # The tokens of the last piece that was decoded, then those after it.
        self._known = len(self._window)  # So many tokens of the window have given their text.
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next token; give the text that is now certain, without the stop string."""
        if self.stopped is not None:
            return ""
        self._window.append(token)
        # The piece before is decoded again with the new tokens: how a token reads may depend on its neighbour.
        before, after = self._decode(self._window[: self._known]), self._decode(self._window)
        if after.endswith(UNFINISHED) and len(self._window) - self._known < LONGEST_CHARACTER_TOKENS:
            return ""
        if len(after) <= len(before) and len(self._window) - self._known < LONGEST_CHARACTER_TOKENS:
            return ""
        del self._window[: self._known]
        self._known = len(self._window)
        return self._release(after[len(before) :])

    def feed(self, tokens: Sequence[int]) -> str:
        """Take several tokens; see ``push``."""
        return "".join([self.push(token) for token in tokens])

    def finish(self) -> str:
        """Give the text withheld so far: the response is over and no stop string came."""
        if self.stopped is not None:
            return ""
        before, after = self._decode(self._window[: self._known]), self._decode(self._window)
        rest = self._release(after[len(before) :])
        if self.stopped is None:
            rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        held = self._held + text
        places = [(at, s) for s in self._stop if (at := held.find(s)) >= 0]
        if places:
            at, self.stopped = min(places)
            return held[:at]
        keep = max(_overlap(held, s) for s in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
