"""Completions in batches: the same as one by one, with and without the adapter."""

from pathlib import Path

import pytest

from qdpo.data.layouts.pair import detect_layout
from qdpo.data.read.files import Place
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Preparation
from qdpo.model.base.load import load_tokenizer
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
