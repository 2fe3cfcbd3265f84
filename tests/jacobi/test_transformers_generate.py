"""``model.generate(custom_generate=…)`` with our function and with an exported directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.dynamic_module_utils import check_imports

from jf_cluster.jacobi.decoding import Generation
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.transformers_generate import UnsupportedGenerationError, generate
from jf_cluster.package_decoder import write_decoder

from .conftest import END, make_model, oracle_responses, random_prompts

PAD = 0


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = random_prompts(lengths)
    width = max(lengths)
    ids = torch.tensor([[PAD] * (width - len(p)) + p.tolist() for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("options", [{}, {"drafting": "multiblock", "block_size": 6, "pool": 2}], ids=str)
def test_it_gives_what_transformers_gives(model: PreTrainedModel, options: dict) -> None:
    ids, mask = padded([5, 9, 2])
    settings = {"attention_mask": mask, "max_new_tokens": 24, "eos_token_id": [END, 7], "pad_token_id": PAD}
    expected = model.generate(ids, do_sample=False, **settings)
    statistics: list[Generation] = []
    got = model.generate(ids, do_sample=False, custom_generate=generate, statistics=statistics, **settings, **options)
    assert torch.equal(got, expected)
    assert len(statistics) == 3 and sum(s.forwards for s in statistics) < sum(len(s.tokens) - 1 for s in statistics)


def test_samples_do_not_depend_on_the_mode_and_follow_the_seed(qwen2: PreTrainedModel) -> None:
    ids, mask = padded([5, 9])
    settings = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": END, "pad_token_id": PAD}
    settings |= {"do_sample": True, "temperature": 0.9, "top_k": 12, "custom_generate": generate}
    first = qwen2.generate(ids, seed=1, drafting="ar", **settings)
    assert torch.equal(first, qwen2.generate(ids, seed=1, drafting=Drafting("jacobi", 8), **settings))
    assert not torch.equal(first[:, :12], qwen2.generate(ids, seed=2, drafting="ar", **settings)[:, :12])
    torch.manual_seed(5)
    drawn = qwen2.generate(ids, **settings)
    torch.manual_seed(5)
    assert torch.equal(drawn, qwen2.generate(ids, **settings))


def test_what_it_does_not_serve_is_refused(qwen2: PreTrainedModel) -> None:
    ids, _ = padded([5])
    for wrong, message in (
        ({"repetition_penalty": 1.5}, "RepetitionPenalty.*switch it off in the call, as repetition_penalty=1.0"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"drafting": "warp"}, "unknown decoding mode 'warp'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            qwen2.generate(ids, max_new_tokens=4, eos_token_id=END, pad_token_id=PAD, custom_generate=generate, **wrong)
    for wrong, setting in (
        ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)])}, "max_length"),
        ({"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(7)])}, "eos_token_id"),
        ({"logits_processor": LogitsProcessorList([TopKLogitsWarper(1)]), "do_sample": True}, "top_k"),
    ):
        with pytest.raises(
            UnsupportedGenerationError, match=f"Jacobi decoding takes no .*: give {setting}= in its stead"
        ):
            qwen2.generate(ids, max_new_tokens=4, eos_token_id=END, pad_token_id=PAD, custom_generate=generate, **wrong)
    with pytest.raises(UnsupportedGenerationError, match="stop strings need tokenizer="):
        generate(qwen2, inputs=ids, stop_strings="x", max_new_tokens=4)
    with pytest.raises(UnsupportedGenerationError, match="assistant_model: leave it out"):
        generate(qwen2, inputs=ids, assistant_model=qwen2, max_new_tokens=4)


ELSEWHERE = """
import sys
for name in [n for n in sys.modules if n.split(".")[0] == "jf_cluster"]:
    del sys.modules[name]
for name in ("jf_cluster", "trajectory_store", "ray", "deepspeed", "pyarrow"):
    sys.modules[name] = None  # importing it fails, as where only torch and transformers are installed
import torch
from transformers import AutoModelForCausalLM

class Letters:
    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(48 + t) for t in tokens)

class Streamer:
    seen = []
    def put(self, value):
        self.seen += value.flatten().tolist()
    def end(self):
        self.seen.append("end")

path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path)
ids = torch.tensor([eval(sys.argv[2])])
settings = dict(max_new_tokens=24, do_sample=False, custom_generate=path)
try:
    model.generate(ids, trust_remote_code=False, **settings)
except ValueError as error:
    assert "custom generation code" in str(error), error
else:
    raise AssertionError("remote code ran without being trusted")
settings["trust_remote_code"] = True
statistics = []
out = model.generate(ids, statistics=statistics, streamer=Streamer(), block_size=8, **settings)[0].tolist()
assert Streamer.seen == [*out, "end"], (Streamer.seen, out)
assert statistics[0].forwarded_tokens > 2 * statistics[0].forwards  # drafts, not one token after the other
print(out[ids.shape[1]:])
stop = Letters().decode(out[ids.shape[1] + 2 : ids.shape[1] + 4])
cut = model.generate(ids, stop_strings=[stop], tokenizer=Letters(), **settings)[0].tolist()
assert stop in Letters().decode(cut[ids.shape[1]:]) and out[: len(cut)] == cut and len(cut) < len(out)
"""


def test_an_exported_directory_decodes_where_only_torch_and_transformers_are(tmp_path: Path) -> None:
    model = make_model("qwen2", 1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    model.save_pretrained(tmp_path / "model-1.5")
    files = write_decoder(tmp_path / "model-1.5")
    for file in files:
        check_imports(file)  # what the hub would demand of whoever loads it
        assert "jf_cluster.jacobi" not in "".join(
            line for line in file.read_text().splitlines() if line.lstrip().startswith(("from", "import"))
        )
    prompt = random_prompts([6], seed=3)[0]
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "model-1.5"), str(prompt.tolist())],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(oracle_responses(model, [prompt], 24)[0])
