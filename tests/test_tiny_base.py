"""What ``make tiny-base`` makes is what is shipped, as far as that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from jf_cluster.tiny import pretrain

SHIPPED = Path(pretrain.__file__).parent / "base"


def test_the_shipped_tokenizer_is_made_again_exactly() -> None:
    made = pretrain.build_tokenizer()
    rules = json.loads(made.backend_tokenizer.to_str())
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    rules.pop("padding"), shipped.pop("padding")  # left behind by whoever used it last
    assert len(shipped["model"]["vocab"]) == 768
    assert rules == shipped
    assert made.chat_template == (SHIPPED / "chat_template.jinja").read_text()
