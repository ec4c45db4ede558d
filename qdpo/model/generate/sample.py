"""Samples answers in batches, each from its own random stream, so an answer does not depend on its batch.

B answers of a batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from qdpo.model.generate.generate import contiguous_head_input, device_of, end_tokens, until_end

LOGIT_BYTES = 48
"""Bytes per vocabulary entry while an answer's next token is sampled, counting the tensors alive at once: logits,
logits over the temperature, and the remaining scores (4 each); sorted values, their order, probabilities and sums for
top-p (20); sums in double precision, and their inputs (16)."""


@dataclass(frozen=True)
class Draw:
    """One answer to sample: the ids of its prompt, and the seed of its random stream."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """The ids of an answer without its end token; `cut` if it had none."""

    ids: list[int]
    cut: bool


def bytes_an_answer(config: Any, element: int, prompt: int, max_new_tokens: int) -> int:
    """Upper bound of the memory of one more answer in a batch: keys and values, and its row of logits.

    `element` is the size of a number of the compute type, in bytes. Keys and values are copied as they grow, one layer
    at a time.
    """
    text = config.get_text_config()
    # Layers may differ; then transformers does not say of the whole config what is true of some layers alone.
    width = max(_key_width(layer) for layer in getattr(text, "per_layer_config", None) or [text])
    cache = 2 * (text.num_hidden_layers + 1) * width * element * (prompt + max_new_tokens)
    return int(cache + LOGIT_BYTES * text.vocab_size)


def _key_width(layer: Any) -> int:
    """Numbers of one token's keys in a layer; 0 in a model without attention."""
    heads = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", 0)
    if not heads:
        return 0
    return int(heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads))


def draw(
    model: Any, tokenizer: Any, draws: Sequence[Draw], *, max_new_tokens: int, temperature: float, top_p: float
) -> list[Drawn]:
    """Samples one batch of answers at a temperature above 0.

    An answer depends on the model, its prompt and its seed; a different batch changes it only if rounding decides
    between two tokens.
    """
    ends, device = end_tokens(model, tokenizer), device_of(model)
    width = max(len(one.prompt) for one in draws)
    token_BT = torch.full((len(draws), width), ends[0])
    mask_BT = torch.zeros_like(token_BT)
    for line, one in enumerate(draws):
        token_BT[line, width - len(one.prompt) :] = torch.tensor([int(token) for token in one.prompt])
        mask_BT[line, width - len(one.prompt) :] = 1
    chooser = _Chooser([one.seed for one in draws], width, max_new_tokens, temperature, top_p)
    # Greedy search: the chooser leaves only one score finite.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0], use_cache=True,
        repetition_penalty=1.0,
    )  # fmt: skip
    with torch.no_grad(), contiguous_head_input(model):
        output_BT = model.generate(
            input_ids=token_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config,
            logits_processor=LogitsProcessorList([chooser]),
        )  # fmt: skip
    found = []
    for row in output_BT[:, width:].tolist():
        ids = until_end(row, ends)
        cut = ids[-1] not in ends
        found.append(Drawn(ids if cut else ids[:-1], cut))
    return found


class _Chooser(LogitsProcessor):  # type: ignore[misc]
    """Samples a token for each answer: the first whose cumulative probability exceeds a number from its own stream."""

    def __init__(self, seeds: Sequence[int], width: int, max_new_tokens: int, temperature: float, top_p: float):
        numbers = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self._number_BT, self._width = torch.from_numpy(numbers), width
        self._temperature = TemperatureLogitsWarper(temperature)
        self._top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        score_BV = self._temperature(input_ids, scores.float())
        if self._top_p is not None:
            score_BV = self._top_p(input_ids, score_BV)
        sum_BV = score_BV.softmax(-1).double().cumsum(-1)
        number_B = self._number_BT[:, input_ids.shape[1] - self._width].to(sum_BV.device)
        # Strictly above the number: a token of probability 0 adds nothing to the sum, so it is never the first above.
        chosen_B1 = torch.searchsorted(sum_BV, (number_B * sum_BV[:, -1])[:, None], right=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)
