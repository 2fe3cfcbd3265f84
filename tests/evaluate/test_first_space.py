"""Code completions of a model whose tokenizer, as Llama 2's, puts a space before every text and takes one away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jf_cluster.collect.crew import WorkerModels
from jf_cluster.collect.prompts import Prompt, tokenized
from jf_cluster.config import Config
from jf_cluster.evaluate.graders.code import CodeReference, is_right
from jf_cluster.evaluate.worker import Evaluator
from jf_cluster.inference.chat import answers
from jf_cluster.inference.files import Task, respond
from jf_cluster.inference.loaded import Loaded, Settings
from jf_cluster.jacobi.drafts import Drafting
from jf_cluster.jacobi.sampling import GREEDY
from jf_cluster.models import load_model, load_tokenizer
from tests.evaluate.conftest import collector_of_round_2
from tests.flow.conftest import small_config
from tests.jacobi.conftest import llama_tokenizer

SAME = 'def f(x):\n    """Same."""\n'
REFERENCE = CodeReference("assert f(3) == 3", SAME, "f")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model that continues a line's end by ``    return x``: each token decides the next one."""
    directory = tmp_path_factory.mktemp("llama")
    backend = llama_tokenizer("▁▁▁", "▁return", "▁x")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(directory)
    size, end = len(tokenizer), tokenizer.eos_token_id
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, hidden_size=size, eos_token_id=end, **shape))
    layer = model.model.layers[0]
    follows = {backend.token_to_id("\n"): 3, 3: 4, 4: 5, 5: end}
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for token, following in follows.items():
            model.lm_head.weight[following, token] = 1
    model.save_pretrained(directory)
    changes = {"prompts__template": "plain", "prompts__grader": "code", "collect__responses": "verified"}
    config = small_config(directory / "runs", directory, **changes)
    Path(config.model_dir(1)).parent.mkdir(parents=True)
    Path(config.model_dir(1)).symlink_to(directory)
    return config


@pytest.fixture(scope="module")
def prompt(config: Config) -> Prompt:
    return tokenized(SAME, REFERENCE.to_text(), load_tokenizer(config), "plain")


def test_an_evaluated_answer_keeps_it(config: Config, prompt: Prompt) -> None:
    answered = Evaluator(config, 0, {prompt.prompt_id}, WorkerModels(config)).run([prompt])
    for given in answered.result.answers.values():
        assert [(a.text, a.right) for a in given] == [("    return x", True)]


def test_a_collected_response_is_graded_with_it(config: Config, prompt: Prompt) -> None:
    ((response, _),) = filter(None, collector_of_round_2(config)._own([prompt], [0]))
    assert response.tokens.tolist() == [3, 4, 5, 1]


def test_an_answer_is_shown_with_it(config: Config, prompt: Prompt) -> None:
    loaded = Loaded(load_model(config, 0), load_tokenizer(config), (1,))
    settings = Settings(Drafting("jacobi", 8), GREEDY, max_new_tokens=8, stop=("  return",))
    ids = prompt.tokens.tolist()
    ((_, row),) = respond(loaded, [Task(1, {}, ids)], settings, batch=1)
    assert row["response"] == "  " == "".join(run.text for run in answers(loaded, ids, settings))


@pytest.mark.parametrize("reference", [REFERENCE, CodeReference("assert f(3) == 3")])
def test_a_whole_function_may_begin_with_it(config: Config, reference: CodeReference) -> None:
    assert is_right(" def f(x):\n    return x", reference.to_text(), config.sandbox)
