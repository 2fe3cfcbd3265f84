"""Who is to blame for batches that fail: what they hold, the place of one worker, or something all workers share."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = 3
"""Batches that fail in a row before their place is suspected, and for each place before all are."""


@dataclass
class Place:
    """Where a worker is, whichever worker that is at the time."""

    failures: int = 0
    """Batches that failed here in a row."""
    done_before: int = 0
    """Batches of all places that were done before these."""
    failed_before: int = 0


class Failures:
    """Counts the batches of ``places`` places; ``parts`` is what a failed batch is split into."""

    def __init__(self, places: int, parts: int) -> None:
        # A batch and all its parts, at least; a few bad items that are all there is to do are just given up.
        self._enough = max(FAILURES * places, 1 + parts)
        self.done = self.failed = self._items = 0

    def succeeded(self, place: Place) -> None:
        """A batch was done."""
        self.done += 1
        place.failures = 0

    def count(self, place: Place, new_items: int) -> None:
        """A batch failed; ``new_items`` of it had not failed before."""
        if place.failures == 0:
            place.done_before, place.failed_before = self.done, self.failed
        place.failures += 1
        self.failed += 1
        self._items += new_items

    @property
    def total(self) -> bool:
        """Whether so much failed, and nothing succeeded, that it is hardly what the batches hold."""
        return not self.done and min(self.failed, self._items) >= self._enough

    def suspect(self, place: Place) -> bool:
        """Whether it is the place, not its batches: most of those that others had meanwhile succeeded."""
        done, failed = self.done - place.done_before, self.failed - place.failed_before - place.failures
        return place.failures >= FAILURES and done > failed
