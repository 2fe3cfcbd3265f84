"""Text handed out while tokens arrive is the text of all tokens, up to a stop string."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jf_cluster.jacobi.text import TextStream, decode_behind, pieces
from jf_cluster.tiny.pretrain import build_tokenizer
from tests.jacobi.conftest import llama_tokenizer

PIECES = [*(bytes([b]) for b in "aé€😀".encode()), b"ab", b"b", b" a", b""]
"""A byte-level vocabulary: characters of one to four bytes come apart over tokens, some tokens write nothing."""


def decode(tokens: list[int]) -> str:
    return b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")


TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


def characters(text: str) -> st.SearchStrategy[list[int]]:
    return st.just([PIECES.index(bytes([b])) for b in text.encode()])


WHOLE = st.lists(
    st.one_of(*map(characters, "aé€😀"), st.just([len(PIECES) - 4]), st.just([len(PIECES) - 1])), max_size=30
)
"""Texts without broken characters: there the way of decoding them in pieces is not a matter of taste."""


@given(WHOLE)
def test_pieces_join_to_the_whole(pieces: list[list[int]]) -> None:
    tokens = [t for piece in pieces for t in piece]
    text = TextStream(decode)
    assert text.feed(tokens) + text.finish() == decode(tokens)


@given(TOKENS)
def test_broken_characters_do_not_stop_the_stream(tokens: list[int]) -> None:
    text = TextStream(decode)
    got = text.feed(tokens) + text.finish()
    assert [c for c in got if c != "\ufffd"] == [c for c in decode(tokens) if c != "\ufffd"] or "\ufffd" in got


@given(WHOLE, st.lists(st.text("abé ", min_size=1, max_size=3), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[list[int]], stop: list[str]) -> None:
    tokens = [t for piece in pieces for t in piece]
    whole, text = decode(tokens), TextStream(decode, stop)
    got = text.feed(tokens) + text.finish()
    if text.stopped is None:
        assert got == whole and not any(s in whole for s in stop)
    else:
        assert whole.startswith(got + text.stopped) and not any(s in got for s in stop)


def test_only_what_may_become_a_stop_string_is_withheld() -> None:
    text = TextStream(lambda tokens: "".join(map(chr, tokens)), ["END", "\n\n"])
    assert [text.push(ord(c)) for c in "aENx\nEND!"] == ["a", "", "", "ENx", "", "\n", "", "", ""]
    assert text.stopped == "END" and text.finish() == ""


def test_the_work_per_token_does_not_grow() -> None:
    longest = 0

    def counted(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return "x" * len(tokens)

    text = TextStream(counted, ["yy"])
    assert text.feed(range(5000)) == "x" * 5000
    assert longest <= 4


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(decode, [""])


LLAMA = llama_tokenizer("▁▁▁▁", "▁return", "▁x")
EMOJI = [LLAMA.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]


@pytest.mark.parametrize(
    ("prompt", "tokens", "text"),
    [
        (LLAMA.encode("def f(x):\n").ids, [3, 4, 5], "     return x"),
        (LLAMA.encode("[inst] a [/inst]").ids, [4, 5], " return x"),
        ([*LLAMA.encode("a").ids, 0], [3, 4, 5, 1], "     return x"),  # behind a special token
        ([0], [4, 5], "return x"),  # behind nothing else: the text's first space is the tokenizer's
        ([], [4, 5], "return x"),
        ([*LLAMA.encode("a").ids, *EMOJI], [4], " return"),
        ([*LLAMA.encode("a").ids, *EMOJI[:2]], [*EMOJI[2:], 4], "\ufffd\ufffd return"),  # cut within a character
    ],
)
def test_a_response_keeps_its_first_space(prompt: list[int], tokens: list[int], text: str) -> None:
    assert decode_behind(LLAMA.decode, prompt, tokens) == text
    assert "".join(pieces(LLAMA.decode, prompt, tokens)) == text
    stream = TextStream(LLAMA.decode, behind=prompt)
    assert stream.feed(tokens) + stream.finish() == text
    if " " in text:
        stopped = TextStream(LLAMA.decode, [" "], behind=prompt)
        assert stopped.feed(tokens) == text[: text.index(" ")] and stopped.stopped == " "


def test_behind_a_prompt_byte_level_text_is_what_it_is_alone() -> None:
    tokenizer = build_tokenizer(vocab_size=320, examples=200)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 😀?"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    for prompt in (chat, tokenizer.encode("3 😀"), tokenizer.encode("é")):
        for text in ("    return x", "é 😀\n", " .", ""):
            tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
            stream = TextStream(decode, behind=prompt)
            assert decode_behind(decode, prompt, tokens) == decode(tokens) == text
            assert stream.feed(tokens) + stream.finish() == text
