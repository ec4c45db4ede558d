"""Completions in batches: the same as one by one, with and without the adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from qdpo.data.layouts.pair import detect_layout
from qdpo.data.read.files import Place
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Preparation
from qdpo.model.base.load import load_base, load_tokenizer
from qdpo.model.generate.generate import complete
from tests.conftest import tiny_rows, untouched_policy


@pytest.fixture
def loaded(tiny_base: Path) -> tuple:
    tokenizer = load_tokenizer(tiny_base)
    rows = tiny_rows(9)
    work = Preparation(tokenizer, Limits(256, 256), Renderer(tokenizer=tokenizer))
    work.add([(Place("rows", n), row) for n, row in enumerate(rows, 1)], detect_layout(rows, {}, "rows"))
    pairs = work.finish().pairs
    return untouched_policy(tiny_base, pairs), tokenizer, [p.prompt.tolist() for p in pairs]


def test_a_batch_answers_as_each_prompt_alone(loaded: tuple) -> None:
    policy, tokenizer, prompts = loaded
    assert len({len(prompt) for prompt in prompts}) > 2
    together = complete(policy.peft, tokenizer, prompts, max_new_tokens=12, batch=4)
    alone = [complete(policy.peft, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone and len({tuple(answer) for answer in alone}) > 1


def test_the_adapter_is_used_or_not_as_it_is_switched(loaded: tuple) -> None:
    policy, tokenizer, prompts = loaded
    untouched = complete(policy.peft, tokenizer, prompts, max_new_tokens=12)
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    with policy.reference():
        assert complete(policy.peft, tokenizer, prompts, max_new_tokens=12) == untouched
    assert complete(policy.peft, tokenizer, prompts, max_new_tokens=12) != untouched


def test_the_head_gets_contiguous_input(loaded: tuple) -> None:
    policy, tokenizer, prompts = loaded
    head, seen = policy.peft.get_base_model().get_output_embeddings(), []
    plain = head.forward
    head.forward = lambda hidden: (seen.append(hidden.is_contiguous()), plain(hidden))[1]
    complete(policy.peft, tokenizer, prompts, max_new_tokens=3)
    assert seen and all(seen)


def test_the_search_and_sampling_settings_of_a_model_do_not_leak_in(
    loaded: tuple, tiny_base: Path, tmp_path: Path
) -> None:
    """transformers puts a model's own settings in for those that are left open, as num_beams."""
    policy, tokenizer, prompts = loaded
    shutil.copytree(tiny_base, tmp_path / "base")
    own = {"num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "eos_token_id": 2, "top_k": -7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    model = load_base(
        tmp_path / "base", quantization="none", double_quant=False, dtype="fp32", device=torch.device("cpu"),
        attention_name=None, announce=print,
    )  # fmt: skip
    assert model.generation_config.eos_token_id == 2
    plain = load_base(
        tiny_base, quantization="none", double_quant=False, dtype="fp32", device=torch.device("cpu"),
        attention_name=None, announce=print,
    )  # fmt: skip
    plain.generation_config.eos_token_id = 2
    answers = [complete(one, tokenizer, prompts, max_new_tokens=12) for one in (model, plain)]
    assert answers[0] == answers[1]
