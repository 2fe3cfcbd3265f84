"""A set of prompt ids is the set Python would have, of however many parts it is made."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from trajectory_store import PromptIds

IDS = st.lists(st.text(max_size=3) | st.sampled_from(["a", "ab", "é", "ø", "", "\0"]), max_size=12)


@given(st.lists(IDS, max_size=4), IDS, st.integers(0, 3))
def test_it_is_the_set_of_all_parts(parts: list[list[str]], asked: list[str], skipped: int) -> None:
    # A slice shares its buffers with the whole and starts somewhere inside.
    chunks = [pa.array([*["x"] * skipped, *part], pa.string()).slice(skipped) for part in parts]
    found, expected = PromptIds(chunks), set().union(*parts)
    assert found == expected and len(found) == len(expected) and set(found) == expected
    wanted = pa.array([*["y"] * skipped, *asked], pa.large_string()).slice(skipped)
    assert found.mask(wanted).tolist() == [prompt_id in expected for prompt_id in asked]
    assert found | {"new"} == expected | {"new"} and found - {"a"} == expected - {"a"}
