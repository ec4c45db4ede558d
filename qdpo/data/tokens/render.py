"""Renders a pair as three texts: the prompt exactly as at inference, and the two responses that may follow it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qdpo.data.layouts.pair import Message, Pair, Rejection
from qdpo.data.layouts.turns import RowProblem, excerpt
from qdpo.data.tokens.templates import end_token, uses_chat_template
from qdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = re.compile(r"<think>.*?</think>|\A.*?</think>", re.DOTALL)
PLACE = "\uf8ff"  # placeholder of an answer: a character of the private use area, which no template looks at
HIDDEN_FROM = 0xE000
# Outcomes for a system message that the template does not take.
REFUSED_SYSTEM = {
    "system_folded": "the template takes no system message: it was put before the first question",
    "system_left_out": "the template takes no system message: it was left out",
    "system_unfoldable": "the template takes no system message: it was left out, as no question follows it",
}


@dataclass(frozen=True)
class Rendered:
    """Prompt and both responses; prompt + response is the whole training text, up to the end of the turn."""

    prompt: str
    chosen: str
    rejected: str
    hidden: Mapping[str, str] = field(default_factory=dict)
    """Placeholder characters in messages, each with the special token's text that it replaces."""
    mended: tuple[tuple[str, str], ...] = ()

    @property
    def three(self) -> tuple[str, str, str]:
        """Prompt, chosen and rejected response."""
        return self.prompt, self.chosen, self.rejected


@dataclass
class Fact:
    """An observation about what a template did to rows: how often, and an example."""

    count: int
    example: str


@dataclass(kw_only=True)
class Renderer:
    """Renders pairs with one tokenizer and one set of settings, and counts what the template did to them.

    `system` is put before conversations without a system message; `refused_system` (fold, drop, error) says what to do
    with a system message that the template does not take.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str = "auto"
    system: str | None = None
    refused_system: str = "fold"
    merge_same_role: bool = False
    facts: dict[str, Fact] = field(default_factory=dict)
    _refusal: str | None = None
    """The reason why the template does not take system messages, once it has refused one."""
    _after_answers: set[str] = field(default_factory=set)
    """Texts that the template has written after an answer."""

    def render(self, pair: Pair) -> Rendered | Rejection:
        """The three texts, or the reason why there are none.

        Raises: DataError for conversations with a tokenizer without chat template, or for one without an end token.
        """
        turns, mended = pair.prompt, list(pair.mended)
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        if self.merge_same_role and len(merged := _merged(turns)) < len(turns):
            joined = len(turns) - len(merged)
            mended.append(("turns_merged", f"{joined} turns were joined to the preceding turn of the same role"))
            turns = merged
        try:
            if uses_chat_template(self.tokenizer, self.template):
                return self._chat(turns, pair, mended)
            return self._plain(turns, pair, mended)
        except RowProblem as problem:
            return Rejection(pair.row, problem.reason, problem.detail)

    @property
    def _pattern(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer)

    def _plain(self, turns: list[Message], pair: Pair, mended: list[tuple[str, str]]) -> Rendered:
        if pair.is_chat and self.template != "plain":
            raise DataError(
                f"The data are conversations, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template "
                "(it belongs to a base model). Use the instruct version (model.path=…-Instruct), or choose a template: "
                "data.template=chatml (any tokenizer), llama3 (Llama 3 bases), plain ('Human: … Assistant: …') or a "
                "template file. The choice is saved with the adapter."
            )
        if pair.tools or pair.turns:
            raise RowProblem("tools_without_template", "tool calls need a chat template that can write them")
        eos, bos = end_token(self.tokenizer), self.tokenizer.bos_token or ""
        opened = ""  # text that already begins with BOS keeps it
        while bos and not pair.is_chat and turns[0]["content"].startswith(bos):
            opened, turns = bos, [{**turns[0], "content": turns[0]["content"].removeprefix(bos)}, *turns[1:]]
        answers = [{**answer, "content": answer["content"].removesuffix(eos)} for answer in pair.answers()]
        hidden, (turns, answers) = self._hide(turns, answers, mended=mended)
        chosen, rejected = (f" {a['content'].strip()}" if pair.is_chat else a["content"] for a in answers)
        prompt = opened + _plain_prompt(turns, pair.is_chat)
        return Rendered(prompt, chosen + eos, rejected + eos, hidden, tuple(mended))

    def _chat(self, turns: list[Message], pair: Pair, mended: list[tuple[str, str]]) -> Rendered:
        hidden, (turns, answers) = self._hide(turns, list(pair.answers()), mended=mended)
        turns, prompt, refused = self._prompt(turns, pair.tools)
        if refused:
            mended.append((refused, REFUSED_SYSTEM[refused]))
        self._note_thoughts(turns, prompt)
        (before, chosen), (other, rejected) = (self._response(prompt, turns, answer, pair.tools) for answer in answers)
        if before == other:
            prompt += before
        else:  # one answer has a thought and the other does not: the prompt ends before it
            chosen, rejected = before + chosen, other + rejected
        return Rendered(prompt, chosen, rejected, hidden, tuple(mended))

    def _hide(
        self, *groups: list[Message], mended: list[tuple[str, str]]
    ) -> tuple[dict[str, str], tuple[list[Message], ...]]:
        """Replace each special token's text by a character, so that the template's own tokens can be told apart."""
        pattern = self._pattern
        texts = {match[0] for turns in groups for turn in turns for match in pattern.finditer(turn["content"])}
        if not texts:
            return {}, groups
        shown = ", ".join(map(repr, sorted(texts)))
        mended.append(("special_token_text", f"a message contains {shown}, which is tokenised as ordinary text"))
        used = {letter for turns in groups for turn in turns for letter in turn["content"]}
        free = (chr(code) for code in range(HIDDEN_FROM, ord(PLACE)) if chr(code) not in used)
        letter_of = dict(zip(sorted(texts), free, strict=False))

        def hide(turn: Message) -> Message:
            return {**turn, "content": pattern.sub(lambda match: letter_of[match[0]], turn["content"])}

        return {letter: text for text, letter in letter_of.items()}, tuple([hide(t) for t in turns] for turns in groups)

    def _prompt(self, turns: list[Message], tools: list[Any] | None) -> tuple[list[Message], str, str]:
        """The turns as the template takes them, the prompt, and the outcome for a refused system message."""
        if turns[0]["role"] != "system" or not turns[0]["content"].strip():
            return turns, self._apply(turns, tools, add_generation_prompt=True), ""
        refusal = self._refusal
        if refusal is None:
            try:
                prompt = self._apply(turns, tools, add_generation_prompt=True)
                if turns[0]["content"].strip() in prompt:
                    return turns, prompt, ""
                refusal = "the template leaves it out"
            except RowProblem as problem:
                refusal = problem.detail
        others, what = self._without_system(turns)
        prompt = self._apply(others, tools, add_generation_prompt=True)  # a second refusal has another cause
        if self.refused_system == "error":
            raise DataError(
                f"The chat template does not take a system message ({refusal}), and data.refused_system=error. Use "
                "data.refused_system=fold to put it before the first question, or drop."
            )
        self._refusal = refusal
        self._note(what, refusal)
        return others, prompt, what

    def _without_system(self, turns: list[Message]) -> tuple[list[Message], str]:
        system, first, *rest = turns
        if self.refused_system == "drop":
            return [first, *rest], "system_left_out"
        if first["role"] != "user":
            return [first, *rest], "system_unfoldable"
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest], "system_folded"

    def _response(self, prompt: str, turns: list[Message], answer: Message, tools: list[Any] | None) -> tuple[str, str]:
        """Text that belongs to the prompt after all, and the response up to the token at which generation stops."""
        full, content = self._apply([*turns, answer], tools), answer["content"].strip()
        is_text = set(answer) == {"role", "content"}
        if not is_text and not full.startswith(prompt):
            raise self._rerendered(prompt, full)
        if full.startswith(prompt):
            rest = full[len(prompt) :]
            if not is_text:  # tool calls may contain special tokens of their own; the last one ends the turn
                return "", self._to_end(rest, max((m.start() for m in self._pattern.finditer(rest)), default=0))
            end = len(rest) - len(rest.lstrip()) + len(content)
            if rest[:end].endswith(content) and rest[end:].strip() in self._after_answers:
                return "", self._to_end(rest, end)
        return self._place_answer(prompt, full, turns, answer, tools)

    def _place_answer(
        self, prompt: str, full: str, turns: list[Message], answer: Message, tools: list[Any] | None
    ) -> tuple[str, str]:
        """As `_response`, for templates that write text before the answer, or change earlier turns or the answer."""
        frame = self._apply([*turns, {"role": "assistant", "content": PLACE}], tools)
        before, found, after = frame.partition(PLACE)
        if not found:
            raise self._rerendered(prompt, full)
        content, written = answer["content"], full[len(before) : len(full) - len(after)]
        if full.startswith(before) and full.endswith(after) and written.strip() == content.strip():
            pass  # unchanged, up to white space at its ends
        elif "</think>" in content:
            self._note("thinking_kept", excerpt(content))
            written = content
        else:
            raise RowProblem("template_changes_answer", f"the template changes the answer: {_parting(content, full)}")
        self._after_answers.add(after.strip())
        response = self._to_end(written + after, len(written))
        if before.startswith(prompt):
            return self._inserted(before[len(prompt) :], written, response, prompt, turns, tools)
        question = prompt.rfind(turns[-1]["content"].strip())
        _earlier, same_end, space = before.rpartition(prompt[max(question, 0) :])
        if question < 0 or not same_end or space.strip():
            raise self._rerendered(prompt, full)
        self._note("prompt_kept", _parting(prompt, before))
        return "", space + response

    def _inserted(
        self, text: str, written: str, response: str, prompt: str, turns: list[Message], tools: list[Any] | None
    ) -> tuple[str, str]:
        """Assign text that the template puts before an answer: an empty thought to the prompt, else to the response."""
        if not text.strip():
            return "", text + response
        if self._apply(turns, tools, add_generation_prompt=True, enable_thinking=False) == prompt + text:
            if "</think>" in written:
                return "", response
            self._note("empty_thought", text)
            return text, response
        self._note("text_before_answer", text)
        return "", text + response

    def _to_end(self, text: str, after: int) -> str:
        """`text` up to the end of the first special tokens from place `after`; if there are none, EOS is added."""
        pattern = self._pattern
        match = pattern.search(text, after)
        if match is None:
            return text.rstrip() + end_token(self.tokenizer)
        end = match.end()
        while following := pattern.match(text, end):
            end = following.end()
        # The rest is never generated: a line break, or the header of a turn that some templates always open.
        return text[: end if not pattern.sub("", text[end:]).strip() else match.end()]

    def _apply(self, turns: list[Message], tools: list[Any] | None, **options: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options))
        except (TemplateError, TypeError, ValueError) as error:  # unexpected fields for the template
            roles = [turn["role"] for turn in turns]
            offer = "; data.merge_same_role=true joins turns of one role" * any(map(str.__eq__, roles, roles[1:]))
            raise RowProblem("template_refuses", f"{error} (turns: {', '.join(roles)}{offer})") from None

    def _rerendered(self, prompt: str, full: str) -> RowProblem:
        return RowProblem(
            "template_rerenders_prompt",
            f"the template changes the prompt if an answer follows: {_parting(prompt, full)}",
        )

    def _note_thoughts(self, turns: list[Message], prompt: str) -> None:
        for turn in turns:
            thought = THOUGHT.search(turn["content"]) if turn["role"] == "assistant" else None
            if thought and thought[0].strip() not in prompt:
                self._note("thinking_stripped", excerpt(thought[0]))

    def _note(self, name: str, example: str) -> None:
        fact = self.facts.setdefault(name, Fact(0, example))
        fact.count += 1


def _plain_prompt(turns: list[Message], is_chat: bool) -> str:
    if not is_chat:
        return "\n\n".join(turn["content"] for turn in turns)
    names = {"system": "", "user": "Human: ", "assistant": "Assistant: ", "tool": "Tool: "}
    return "\n\n".join([*(names[turn["role"]] + turn["content"] for turn in turns), "Assistant:"])


def _merged(turns: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"] and turn["role"] != "tool":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def _parting(one: str, other: str) -> str:
    """The place where two texts begin to differ, for a message."""
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, place - 20)
    return f"{one[start : place + 40]!r} became {other[start : place + 40]!r}"


@lru_cache(maxsize=4)
def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Finds the text of any special token of the tokenizer."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
