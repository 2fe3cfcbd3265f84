"""What ``make tiny-base`` makes is what is shipped, as far as that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from jf_cluster.models import tokenizer_hash, tokenizer_of
from jf_cluster.tiny import pretrain

SHIPPED = Path(pretrain.__file__).parent / "base"


def test_the_shipped_tokenizer_is_made_again_exactly() -> None:
    made = pretrain.build_tokenizer()
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    assert len(shipped["model"]["vocab"]) == 768
    assert json.loads(made.backend_tokenizer.to_str())["model"] == shipped["model"], "vocabulary and merges"
    assert tokenizer_hash(made) == tokenizer_hash(tokenizer_of(str(SHIPPED))), "the rest of its rules, and the template"
