"""Arithmetic word problems: an endless generator of questions, worked solutions and exact answers.

A problem tells how somebody's collection grows and shrinks over some events and ends with a question; how many
events and how large the numbers become is its difficulty.
The solution carries each intermediate result into the next step and copies names, objects and places from the
question, so a model has to read, remember and calculate; the wording of a solution is a function of the question.

Training and held-out problems never overlap: a question belongs to the held-out split exactly when the first
byte of its SHA-256 digest is below ``HELD_OUT_BYTES``, and each split only ever yields its own questions.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

HELD_OUT_BYTES = 16
"""Of 256 values of the digest's first byte, this many mark a question as held out."""

NAMES = (
    "Ada Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Umar Vera Will Xena Yuri Zoe "
    "Anna Boris Clara David Emma Felix Grace Henry Ivan Julia Kofi Lena Marco Nina Omar Petra Quinn Ravi Sofia Tom Uma Victor "
    "Wanda Yara Zane"
).split()
COLOURS = "red blue green yellow white black golden silver small big old new".split()
OBJECTS = (
    "marbles apples stamps coins shells books cards pencils buttons stickers beads cookies stones keys flowers balls "
    "ribbons candles eggs pears plums nuts cups dolls kites lamps rings shirts spoons tickets toys masks"
).split()
CONTAINERS = "bags boxes jars packs baskets crates tins trays".split()
PLACES = "park beach market school station garden library river forest museum harbor bakery farm bridge theater castle".split()


@dataclass(frozen=True)
class Difficulty:
    """What makes a problem harder to answer."""

    events: tuple[int, int] = (2, 4)
    """Fewest and most events between the opening and the closing question."""
    max_total: int = 120
    """The largest running total; a collection starts with, gains by a find or gift, and is sold at up to half of it."""

    def __post_init__(self) -> None:
        if not 1 <= self.events[0] <= self.events[1] or self.max_total < 20:
            raise ValueError(f"{self}: events must be an ascending pair from 1 on, max_total at least 20")

    @property
    def half(self) -> int:
        return self.max_total // 2


EMBEDDED = Difficulty()
"""What the shipped base was trained on."""

HARD = Difficulty(events=(4, 8), max_total=999)
"""For a larger model: twice the events, and numbers of three digits."""


@dataclass(frozen=True)
class Problem:
    """One word problem: its question, worked solution and exact final answer."""

    question: str
    solution: str
    answer: int


def _draw(rng: random.Random, difficulty: Difficulty) -> Problem:
    name, friend = rng.sample(NAMES, 2)
    colour, things = rng.choice(COLOURS), rng.choice(OBJECTS)
    total = rng.randint(5, difficulty.half)
    opening = (
        f"{name} has {total} {colour} {things}.",
        f"At first {name} owns {total} {colour} {things}.",
        f"There are {total} {colour} {things} in the room of {name}.",
    )
    question = [rng.choice(opening)]
    solution = [f"{name} starts with {total} {colour} {things}."]
    for _ in range(rng.randint(*difficulty.events)):
        asked, told, total = _event(rng, difficulty, total, name, friend, things)
        question.append(asked)
        solution.append(told)
    asked, told, total = _ending(rng, difficulty, total, name, colour, things)
    question.append(asked)
    solution.append(told)
    return Problem(" ".join(question), " ".join(solution) + f"\n#### {total}", total)


def _event(
    rng: random.Random, difficulty: Difficulty, total: int, name: str, friend: str, things: str
) -> tuple[str, str, int]:
    """Draw one event: its sentence in the question, its step in the solution and the new running total."""
    place = rng.choice(PLACES)
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    room = difficulty.max_total - total
    kinds = [
        kind
        for kind, possible in (
            ("buy", count * each <= room),
            ("find", room >= 2),
            ("gift", room >= 2),
            ("give", total >= 4),
            ("lose", total >= 4),
            ("use", total > count * each),
        )
        if possible
    ]
    kind = rng.choice(kinds)
    if kind == "buy":
        box, product = rng.choice(CONTAINERS), count * each
        asked = rng.choice(
            (
                f"{name} buys {count} {box} with {each} {things} in each.",
                f"At the {place} {name} buys {count} {box} of {each} {things}.",
            )
        )
        told = f"The {count} {box} hold {count} * {each} = {product} {things}, so {name} has {total} + {product} = {total + product}."
        return asked, told, total + product
    if kind == "use":
        product = count * each
        asked = f"Then {count} children take {each} {things} each."
        told = f"The {count} children take {count} * {each} = {product} {things}, which leaves {total} - {product} = {total - product}."
        return asked, told, total - product
    more, less = rng.randint(2, max(2, min(difficulty.half, room))), rng.randint(2, max(2, total - 1))
    if kind == "find":
        asked = rng.choice((f"{name} finds {more} more at the {place}.", f"At the {place} {name} finds {more} others."))
        return (
            asked,
            f"With {more} from the {place} there are {total} + {more} = {total + more} {things}.",
            total + more,
        )
    if kind == "gift":
        asked = rng.choice((f"{friend} gives {name} {more} {things}.", f"{name} gets {more} {things} from {friend}."))
        return (
            asked,
            f"After the gift from {friend}, {name} has {total} + {more} = {total + more} {things}.",
            total + more,
        )
    if kind == "give":
        asked = rng.choice((f"{name} gives {less} {things} to {friend}.", f"{friend} gets {less} of the {things}."))
        return (
            asked,
            f"After giving {less} to {friend}, {name} has {total} - {less} = {total - less} {things}.",
            total - less,
        )
    asked = rng.choice(
        (f"{name} loses {less} on the way to the {place}.", f"On the way to the {place} {less} are lost.")
    )
    return asked, f"Losing {less} near the {place} leaves {total} - {less} = {total - less} {things}.", total - less


def _ending(
    rng: random.Random, difficulty: Difficulty, total: int, name: str, colour: str, things: str
) -> tuple[str, str, int]:
    """Draw the closing question and the solution's last step."""
    price = rng.randint(2, 5)
    sharers = [k for k in range(2, 7) if total % k == 0]
    kind = rng.choice(("count", "count", "sell", "share"))
    if kind == "sell" and total <= difficulty.half:
        asked = f"{name} sells all of them for {price} dollars each. How many dollars does {name} get?"
        return (
            asked,
            f"Selling {total} {colour} {things} brings {total} * {price} = {total * price} dollars.",
            total * price,
        )
    if kind == "share" and sharers:
        k = rng.choice(sharers)
        asked = f"The {things} are shared equally by {k} people. How many {things} does each of them get?"
        return asked, f"Each of the {k} people gets {total} / {k} = {total // k} {colour} {things}.", total // k
    asked = f"How many {colour} {things} does {name} have now?"
    return asked, f"So {name} has {total} {colour} {things} now.", total


def split_of(question: str) -> Split:
    """Say which split a question belongs to (a pure function of its text)."""
    return "heldout" if hashlib.sha256(question.encode()).digest()[0] < HELD_OUT_BYTES else "train"


def problem(split: Split, seed: int, index: int, difficulty: Difficulty = EMBEDDED) -> Problem:
    """Give problem number ``index`` of a split; the same arguments always give the same problem."""
    attempt = 0
    while True:
        drawn = _draw(random.Random(f"{split}:{seed}:{index}:{attempt}"), difficulty)
        if split_of(drawn.question) == split:
            return drawn
        attempt += 1


def problems(split: Split, seed: int, start: int = 0) -> Iterator[Problem]:
    """Yield the problems of a split without end, from number ``start``."""
    index = start
    while True:
        yield problem(split, seed, index)
        index += 1


def parse_answer(response: str) -> int | None:
    """Read the number after the last ``####`` of a response, or None where there is none."""
    found = re.findall(r"####\s*(-?\d+)\s*$", response.strip())
    return int(found[-1]) if found else None
