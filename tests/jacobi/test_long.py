"""What a token costs besides the model does not depend on how many were written before it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jf_cluster.jacobi.drafts import Drafting, Row
from jf_cluster.jacobi.text import TextStream


@pytest.mark.parametrize("drafting", [Drafting("ar"), Drafting("jacobi", 16), Drafting("multiblock", 16)], ids=str)
def test_bookkeeping_of_8192_tokens_is_not_quadratic(drafting: Drafting) -> None:
    """A model that writes random tokens, so without a model; the processor's time, so whatever else runs here."""
    random = np.random.default_rng(0)
    text = TextStream(lambda ids: " ".join(map(str, ids)) + " ", ["never"])
    row = Row(random.integers(0, 300, 50).tolist(), 1, drafting, 8192, frozenset(), text=text)
    row.begin(1)
    spent: list[tuple[int, float]] = []
    while not row.done:
        begun = time.process_time()
        assert len(row.proposed) == len(row.depths) == row.own_ranges.shape[1]
        written = random.integers(0, 300, 1 + len(row.draft)).tolist()
        written[: len(row.draft)] = row.draft[:3] + written[3 : len(row.draft)]  # three of a draft are right
        row.advance(written[: 1 + len(row.draft)], [random.integers(0, 300, len(c)).tolist() for c in row.candidates])
        spent.append((len(row.tokens), time.process_time() - begun))
    early = np.median([s for at, s in spent if 1024 <= at < 2048])
    late = np.median([s for at, s in spent if at >= 7168])
    # Work over everything written before would make late steps five times as dear; whatever runs beside this, twice.
    assert late < 3 * early, (early, late)
