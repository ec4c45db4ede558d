"""Drawing from the model: from its very distribution, and each answer by itself."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdpo.model.generate.generate import end_tokens
from qdpo.model.generate.sample import Draw, draw

PROMPTS = [[5, 9, 30], [7, 8, 11, 40, 41, 42, 50], [12]]


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_base)


def test_an_answer_does_not_depend_on_its_batch(tiny: tuple[Any, Any]) -> None:
    draws = [Draw(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    together = draw(*tiny, draws, **settings)
    alone = [draw(*tiny, [one], **settings)[0] for one in draws]
    assert together == alone and len({tuple(answer.ids) for answer in together}) == len(draws)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.4)])
def test_tokens_are_drawn_with_their_probability(tiny: tuple[Any, Any], temperature: float, top_p: float) -> None:
    """Against plain code: softmax of the logits over the temperature, the most likely tokens up to the sum kept."""
    model, tokenizer = tiny
    count = 6000
    answers = draw(
        model, tokenizer, [Draw(PROMPTS[0], seed) for seed in range(count)], max_new_tokens=1,
        temperature=temperature, top_p=top_p,
    )  # fmt: skip
    ends = end_tokens(model, tokenizer)
    found = Counter(answer.ids[0] if answer.ids else ends[0] for answer in answers)
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature).softmax(-1)
    order = expected.sort(descending=True)
    kept = order.indices[order.values.cumsum(0) - order.values < top_p]
    shares = torch.zeros_like(expected)
    shares[kept] = expected[kept] / expected[kept].sum()
    assert set(found) <= set(kept.tolist())
    for token in kept[:8].tolist():
        share = shares[token].item()
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(found[token] / count - share) < 5 * spread + 1e-9


def test_an_answer_that_does_not_end_is_marked(tiny: tuple[Any, Any]) -> None:
    found = draw(*tiny, [Draw(PROMPTS[0], seed) for seed in range(40)], max_new_tokens=40, temperature=3.0, top_p=1.0)
    ends = end_tokens(*tiny)
    assert {answer.cut for answer in found} == {True, False}
    for answer in found:
        assert (len(answer.ids) == 40) == answer.cut and not set(answer.ids) & set(ends)
