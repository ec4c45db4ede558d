"""Generates completions with a transformers or PEFT model, in batches or streamed, its adapter on or off as set."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, TextStreamer

from qdpo.errors import DataError
from qdpo.families.config_fields import positions


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 25,
    look: Callable[[], None] | None = None,
) -> list[list[int]]:
    """The model's answer to each prompt: token ids up to and including the end token.

    Greedy at temperature 0; else sampled from `seed`, so that equal models give equal answers. Prompts are left-padded
    within a batch of similar lengths. An answer ends where the table of positions does, if the model has one. `look` is
    called after each token; an exception that it raises ends the generation, and leaves the model usable.
    Raises: DataError for a prompt that leaves no room in that table.
    """
    ends, device = end_tokens(model, tokenizer), device_of(model)
    if temperature:
        torch.manual_seed(seed)
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        width = max(len(prompts[index]) for index in members)
        room = _room(model, width, max_new_tokens, only_tables=True)
        config = _settings(ends, room, temperature, repetition_penalty=repetition_penalty)
        token_BT = torch.full((len(members), width), ends[0], device=device)
        mask_BT = torch.zeros_like(token_BT)
        for line, index in enumerate(members):
            ids = torch.tensor([int(token) for token in prompts[index]])
            token_BT[line, width - len(ids) :] = ids.to(device)
            mask_BT[line, width - len(ids) :] = 1
        with torch.no_grad(), contiguous_head_input(model):
            output_BT = model.generate(
                input_ids=token_BT, attention_mask=mask_BT, generation_config=config,
                stopping_criteria=[_Look(look)] if look is not None else None,
            )  # fmt: skip
        for line, index in enumerate(members):
            answers[index] = until_end(output_BT[line, width:].tolist(), ends)
    return [answers[index] for index in range(len(prompts))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    write: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Streams the model's answer to `write` piece by piece, without special tokens.

    An exception raised by `write` or a signal ends the stream, and leaves the model usable. The answer ends at the
    model's last position. Raises: DataError for a prompt that leaves none.
    """
    ends = end_tokens(model, tokenizer)
    config = _settings(ends, _room(model, len(prompt), max_new_tokens), temperature, top_p=top_p)
    torch.manual_seed(seed)
    token_BT = torch.tensor([[int(token) for token in prompt]], device=device_of(model))
    with torch.no_grad(), contiguous_head_input(model):
        model.generate(
            input_ids=token_BT,
            attention_mask=torch.ones_like(token_BT),
            generation_config=config,
            streamer=_Pieces(tokenizer, write),
        )


def _room(model: Any, prompt: int, wanted: int, *, only_tables: bool = False) -> int:
    """New tokens that the model's positions leave after a prompt, at most `wanted`. Raises: DataError if none."""
    limit = positions(model.config.get_text_config())
    if limit is None or (only_tables and not limit.has_table):
        return wanted
    if prompt >= limit.count:
        raise DataError(
            f"The prompt has {prompt:,} tokens, and the model has {limit.count:,} positions for prompt and answer. "
            "Shorten the prompt, or begin a new conversation."
        )
    return min(wanted, limit.count - prompt)


class _Look(StoppingCriteria):  # type: ignore[misc]
    """Calls a function after each token, and ends no answer."""

    def __init__(self, look: Callable[[], None]):
        self._look = look

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_others: Any) -> torch.Tensor:
        self._look()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Decodes tokens to text with complete characters."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def _settings(ends: list[int], max_new_tokens: int, temperature: float, **others: float) -> GenerationConfig:
    """Sets every option that a model's generation config could set, so that answers compare models, not settings."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    if not temperature:
        others.pop("top_p", None)
    return GenerationConfig(
        **{
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "use_cache": True,
            **drawn,
            **others,
        }
    )


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Makes the hidden states contiguous before the output head.

    Generation passes the head a slice, the last position of each prompt, and torch 2.13 then copies the head's weight
    once per prompt: 1.3 GB for 25 prompts with SmolLM2-135M, by arithmetic 1.1 GB a prompt with Qwen2.5-7B.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def device_of(model: Any) -> torch.device:
    """The model's device: that of its output head, since its embedding table may be on the host."""
    device: torch.device = model.get_output_embeddings().weight.device
    return device


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's and the model's own."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends)


def stop_at(model: Any, ends: Sequence[int]) -> None:
    """Makes the model's answers end at these tokens as well, whoever generates them."""
    config = model.generation_config
    own = config.eos_token_id
    stated = own if isinstance(own, list) else [] if own is None else [own]
    if missing := [token for token in ends if token not in stated]:
        config.eos_token_id = [*stated, *missing]


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids
