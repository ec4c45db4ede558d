"""A pair as three texts: the prompt exactly as at inference, and what the model should have said after it."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qdpo.data.pair import Message, Pair, Rejection
from qdpo.data.turns import RowProblem, excerpt
from qdpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = tuple[str, str, str]
"""Prompt, chosen response, rejected response."""


def uses_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """True where `data.template` and the tokenizer lead to the tokenizer's own chat template."""
    if template not in ("auto", "plain"):
        raise ConfigError(f"data.template={template} is unknown. It can be: auto, plain.")
    return template == "auto" and bool(tokenizer.chat_template)


def render(
    pair: Pair, tokenizer: "PreTrainedTokenizerBase", *, template: str = "auto", system: str | None = None
) -> Texts | Rejection:
    """Prompt, chosen response and rejected response as texts; prompt + response is the whole training text.

    `system` is put before conversations that have no system message. Each response ends with its end-of-turn token.
    Raises: DataError if a conversation meets a tokenizer without chat template, or one without an end token.
    """
    turns = pair.prompt
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    try:
        if uses_chat_template(tokenizer, template):
            return _render_chat(turns, pair, tokenizer)
    except RowProblem as problem:
        return Rejection(pair.row, problem.reason, problem.detail)
    if pair.is_chat and template == "auto":
        raise DataError(
            f"The data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template: it "
            "belongs to a base model. Use the instruct version (model.path=…-Instruct), or data.template=plain to "
            "train on 'Human: … Assistant: …' text."
        )
    eos = _eos(tokenizer)
    prompt = _plain_prompt(turns, pair.is_chat)
    chosen, rejected = (_plain_response(answer, pair.is_chat, eos) for answer in (pair.chosen, pair.rejected))
    return prompt, chosen, rejected


def _plain_prompt(turns: list[Message], is_chat: bool) -> str:
    if not is_chat:
        return "\n\n".join(turn["content"] for turn in turns)
    names = {"system": "", "user": "Human: ", "assistant": "Assistant: "}
    return "\n\n".join([*(names[turn["role"]] + turn["content"] for turn in turns), "Assistant:"])


def _plain_response(answer: str, is_chat: bool, eos: str) -> str:
    text = f" {answer.strip()}" if is_chat else answer
    return text if text.endswith(eos) else text + eos


def _render_chat(turns: list[Message], pair: Pair, tokenizer: "PreTrainedTokenizerBase") -> Texts:
    for turn in [*turns, *({"role": "assistant", "content": answer} for answer in (pair.chosen, pair.rejected))]:
        inside = _special_tokens(tokenizer).search(turn["content"])
        if inside:
            # As text it would become the token itself: an answer with "</s>" in it would train the model to stop there.
            raise RowProblem("special_token_in_text", f"the {turn['role']} turn contains the text {inside[0]!r}")
    prompt = _apply_template(tokenizer, turns, add_generation_prompt=True)
    chosen, rejected = (_response(prompt, turns, answer, tokenizer) for answer in (pair.chosen, pair.rejected))
    return prompt, chosen, rejected


def _response(prompt: str, turns: list[Message], answer: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template writes after the prompt, up to the token at which generation stops."""
    full = _apply_template(tokenizer, [*turns, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    if not full.startswith(prompt):
        raise RowProblem(
            "template_rerenders_prompt",
            f"with the answer the template writes another prompt, which ends {full[: len(prompt)][-40:]!r} instead of "
            f"{prompt[-40:]!r}",
        )
    response = full[len(prompt) :]
    place = response.rfind(answer.strip())
    if place < 0:
        raise RowProblem(
            "template_changes_answer", f"the template does not write the answer as it is: {excerpt(answer)!r}"
        )
    after = place + len(answer.strip())
    ends = [match.end() for match in _special_tokens(tokenizer).finditer(response, after)]
    if ends and not response[ends[-1] :].strip():
        return response[: ends[-1]]  # the line break that many templates put after the end token is never generated
    return response.rstrip() + _eos(tokenizer)


def _apply_template(tokenizer: "PreTrainedTokenizerBase", turns: list[Message], *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise RowProblem("template_refuses", f"{error} (turns: {roles})") from None


def _eos(tokenizer: "PreTrainedTokenizerBase") -> str:
    eos = tokenizer.eos_token
    if not eos:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so answers could not be taught to "
            "end. Set eos_token in its tokenizer_config.json."
        )
    return str(eos)


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Finds the text of any special token of the tokenizer."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
