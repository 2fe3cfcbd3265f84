"""The embedded task: problems never change once made, and harder ones are what they say."""

from __future__ import annotations

import hashlib
import itertools
import json
import re

import pytest

from jf_cluster.tiny.problems import EMBEDDED, HARD, Difficulty, parse_answer, problem, split_of


def test_the_problems_the_shipped_base_was_trained_on_stay_as_they_were() -> None:
    """Letter for letter: stores, held-out sets and measured accuracies refer to them by split, seed and number."""
    digest = hashlib.sha256()
    for split, seed, index in itertools.product(("train", "heldout"), (0, 7), range(50)):
        p = problem(split, seed, index)
        digest.update(json.dumps([p.question, p.solution, p.answer]).encode())
    assert digest.hexdigest() == "154942f9a1317107aecf405621b2b4364e19ba3f582615bacca62f481a86a00c"


@pytest.mark.parametrize("difficulty", [EMBEDDED, HARD, Difficulty(events=(1, 1), max_total=20)], ids=str)
def test_a_difficulty_says_how_many_events_there_are_and_how_far_totals_go(difficulty: Difficulty) -> None:
    events, totals = set(), set()
    for index in range(300):
        p = problem("train", 3, index, difficulty)
        steps = p.solution.split("\n")[0].split(". ")  # the opening, a step an event, the ending
        events.add(len(steps) - 2)
        results = [int(re.findall(r"\d+", step)[-1]) for step in steps[1:-1]]
        totals.update(results)
        assert parse_answer(p.solution) == p.answer and split_of(p.question) == "train"
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", p.solution):
            assert eval(f"{left} {sign} {right}") == int(result)
    assert events == set(range(difficulty.events[0], difficulty.events[1] + 1))
    assert 0.8 * difficulty.max_total < max(totals) <= difficulty.max_total and min(totals) > 0


@pytest.mark.parametrize("wrong", [{"events": (0, 2)}, {"events": (5, 4)}, {"max_total": 19}], ids=str)
def test_impossible_difficulties_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Difficulty(**wrong)
