"""``collect.responses: verified``: the newest model's own response where its grader accepts it, else the base's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from jf_cluster.collect.prompts import load_prompts
from jf_cluster.config import TINY_BASE
from jf_cluster.models import load_tokenizer
from tests.evaluate.conftest import collector_of_round_2
from tests.flow.conftest import small_config


def test_the_base_writes_what_the_model_gets_wrong(tmp_path: Path) -> None:
    """And what nothing can be graded by: a row of a data set without a reference answer."""
    changes = {"prompts__per_round": 4, "collect__responses": "verified", "collect__max_new_tokens": 200}
    config = small_config(tmp_path, TINY_BASE, **changes)
    shutil.copytree(TINY_BASE, config.model_dir(1))  # the shipped model, which is nearly always right
    collector = collector_of_round_2(config)
    prompts = load_prompts(config, load_tokenizer(config), 2)
    answers = [prompts[0].answer, "-1", prompts[2].answer, None]
    prompts = [replace(p, answer=answer) for p, answer in zip(prompts, answers, strict=True)]
    own = collector._own(prompts, list(range(4)))
    assert [row is None for row in own] == [False, True, False, True]
    responses, reused = collector._of_base(prompts[1::2], [1, 3])
    assert len(responses) == 2 and all(r.finished for r in responses) and reused == 0
    report = collector.run(prompts)
    assert (report.result.prompts, report.result.unfinished, report.result.disagreements) == (4, 0, 0)
    assert report.result.respond_s > 0 and sorted(report.durable) == sorted(p.prompt_id for p in prompts)
