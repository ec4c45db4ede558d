"""Renders a pair as three texts: the prompt exactly as at inference, and the two responses that may follow it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qdpo.data.layouts.pair import Message, Pair, Rejection
from qdpo.data.layouts.turns import RowProblem, excerpt
from qdpo.data.tokens import thoughts
from qdpo.data.tokens.answer import Answers, Asked, by_setting, calls
from qdpo.data.tokens.chat import ChatTemplate
from qdpo.data.tokens.hide import hide
from qdpo.data.tokens.same_text import holds, holds_value, leaves
from qdpo.data.tokens.templates import Options, check_options, end_token, uses_chat_template
from qdpo.errors import DataError
from qdpo.settings.schema import DataConfig, Reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    reasoning: Reasoning = "drop"
    """What to do with thoughts that the template cannot write."""
    options: Options = field(default_factory=dict)
    """The template's switches."""
    facts: dict[str, Fact] = field(default_factory=dict)
    _refusal: str | None = None
    """The reason why the template does not take system messages, once it has refused one."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> "Renderer":
        """A renderer with the settings of data.*. Raises: ConfigError for a switch that the template does not have."""
        check_options(tokenizer, config.template, config.template_options)
        return cls(
            tokenizer=tokenizer,
            template=config.template,
            system=config.system,
            refused_system=config.refused_system,
            merge_same_role=config.merge_same_role,
            reasoning=config.reasoning,
            options=config.template_options,
        )

    def render(self, pair: Pair) -> Rendered | Rejection:
        """The three texts, or the reason why there are none.

        Raises: DataError for conversations with a tokenizer without chat template, or for one without an end token.
        """
        mended = list(pair.mended)
        try:
            turns = self._settled(pair.prompt, mended)
            if uses_chat_template(self.tokenizer, self.template):
                return self._chat(turns, pair, mended)
            return self._plain(turns, pair, mended)
        except RowProblem as problem:
            return Rejection(pair.row, problem.reason, problem.detail)

    def prompt(self, turns: list[Message], tools: list[Any] | None = None, *, is_chat: bool) -> Rendered | Rejection:
        """The prompt alone, for generation; both responses are empty."""
        mended: list[tuple[str, str]] = []
        try:
            turns = self._settled(turns, mended)
            if not uses_chat_template(self.tokenizer, self.template):
                self._need_template(is_chat)
                if tools:
                    raise RowProblem("tools_without_template", "functions need a chat template that can write them")
                hidden = hide(self.tokenizer, turns, [], None)
                return Rendered(_plain_prompt(hidden.turns, is_chat), "", "", hidden.spelt)
            hidden = hide(self.tokenizer, turns, [], tools)
            taken, text, _refused = self._prompt(hidden.turns, hidden.tools)
            for turn in taken:
                if turn["role"] != "assistant":  # a model's own answers in a talk may be of any form
                    _check_turn(turn["role"], turn["content"], text)
            return Rendered(text, "", "", hidden.spelt)
        except RowProblem as problem:
            return Rejection(1, problem.reason, problem.detail)

    @cached_property
    def _answers(self) -> Answers:
        return Answers(ChatTemplate(self.tokenizer, self.options), self.reasoning, self._note)

    def _settled(self, turns: list[Message], mended: list[tuple[str, str]]) -> list[Message]:
        """The turns with the run's system message, and joined where that is asked for."""
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        if self.merge_same_role and len(merged := _merged(turns)) < len(turns):
            joined = len(turns) - len(merged)
            mended.append(("turns_merged", f"{joined} turns were joined to the preceding turn of the same role"))
            turns = merged
        return turns

    def _need_template(self, is_chat: bool) -> None:
        if is_chat and self.template != "plain":
            raise DataError(
                f"The data are conversations, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template "
                "(it belongs to a base model). Use the instruct version (model.path=…-Instruct), or choose a template: "
                "data.template=chatml (any tokenizer), llama3 (Llama 3 bases), plain ('Human: … Assistant: …') or a "
                "template file. The choice is saved with the adapter."
            )

    def _plain(self, turns: list[Message], pair: Pair, mended: list[tuple[str, str]]) -> Rendered:
        self._need_template(pair.is_chat)
        if pair.tools or any("tool_calls" in turn for turn in (*turns, *pair.answers())):
            raise RowProblem("tools_without_template", "tool calls need a chat template that can write them")
        eos, bos = end_token(self.tokenizer), self.tokenizer.bos_token or ""
        opened = ""  # text that already begins with BOS keeps it
        while bos and not pair.is_chat and turns[0]["content"].startswith(bos):
            opened, turns = bos, [{**turns[0], "content": turns[0]["content"].removeprefix(bos)}, *turns[1:]]
        answers = [self._plain_answer(answer, eos, mended) for answer in pair.answers()]
        for turn in turns:
            self._note_thought(turn.get("reasoning_content", ""), turn["content"])
        hidden = hide(self.tokenizer, turns, answers, None)
        _tell_hidden(hidden.spelt, mended)
        chosen, rejected = (f" {a['content'].strip()}" if pair.is_chat else a["content"] for a in hidden.answers)
        prompt = opened + _plain_prompt(hidden.turns, pair.is_chat)
        return Rendered(prompt, chosen + eos, rejected + eos, hidden.spelt, tuple(mended))

    def _plain_answer(self, answer: Message, eos: str, mended: list[tuple[str, str]]) -> Message:
        content, thought = answer["content"].removesuffix(eos), answer.get("reasoning_content")
        if thought:
            what = f"text without a chat template has no place for the thought {excerpt(thought)!r}"
            before, note = by_setting(self.reasoning, thought, what)
            mended.append(note)
            content = before + content
        return {"role": "assistant", "content": content}

    def _chat(self, turns: list[Message], pair: Pair, mended: list[tuple[str, str]]) -> Rendered:
        answers = [self._answers.apart(answer) for answer in pair.answers()]
        hidden = hide(self.tokenizer, turns, answers, pair.tools)
        _tell_hidden(hidden.spelt, mended)
        turns, prompt, refused = self._prompt(hidden.turns, hidden.tools)
        if refused:
            mended.append((refused, REFUSED_SYSTEM[refused]))
        self._check_prompt(turns, hidden.tools, prompt)
        asked = Asked(turns, hidden.tools, prompt, hidden.place)
        (chosen, chosen_notes), (rejected, rejected_notes) = (
            self._answers.write(asked, answer) for answer in hidden.answers
        )
        mended += dict(rejected_notes + chosen_notes).items()
        return Rendered(prompt, chosen, rejected, hidden.spelt, tuple(mended))

    def _apply(self, turns: list[Message], tools: list[Any] | None) -> str:
        return self._answers.chat.apply(turns, tools, opens=True)

    def _check_prompt(self, turns: list[Message], tools: list[Any] | None, prompt: str) -> None:
        """Notes what the template leaves out of a prompt. Raises: RowProblem for a turn's text that is lost."""
        place = 0
        for turn in turns:
            text, start = turn["content"].strip(), 0 if turn["role"] == "system" else place
            if turn["role"] == "assistant":
                inline = thoughts.inline(text)
                self._note_thought(turn.get("reasoning_content") or (inline.thought if inline else ""), prompt)
                text = inline.rest.strip() if inline else "" if thoughts.is_closed(text) else text
            found = prompt.find(text, start)
            if found < 0:
                _check_turn(turn["role"], text, prompt[start:])
            elif turn["role"] != "system":  # templates put system messages anywhere
                place = found + len(text)
            for name, arguments in calls(turn):
                if not all(holds_value(prompt, part) for part in (name, *leaves(arguments))):
                    self._note("calls_not_in_prompt", name)
        named = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
        if lost := next((name for name in named if isinstance(name, str) and name not in prompt), None):
            self._note("tools_not_in_prompt", lost)

    def _note_thought(self, thought: str, prompt: str) -> None:
        if thought and not holds(prompt, thought):
            self._note("thinking_stripped", excerpt(thought))

    def _prompt(self, turns: list[Message], tools: list[Any] | None) -> tuple[list[Message], str, str]:
        """The turns as the template takes them, the prompt, and the outcome for a refused system message."""
        if turns[0]["role"] != "system" or not turns[0]["content"].strip():
            return turns, self._apply(turns, tools), ""
        refusal = self._refusal
        if refusal is None:
            try:
                prompt = self._apply(turns, tools)
                if turns[0]["content"].strip() in prompt:
                    return turns, prompt, ""
                refusal = "the template leaves it out"
            except RowProblem as problem:
                refusal = problem.detail
        others, what = self._without_system(turns)
        prompt = self._apply(others, tools)  # a second refusal has another cause
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


def _tell_hidden(spelt: Mapping[str, str], mended: list[tuple[str, str]]) -> None:
    if spelt:
        shown = ", ".join(map(repr, sorted(spelt.values())))
        mended.append(("special_token_text", f"a message contains {shown}, which is tokenised as ordinary text"))


def _check_turn(role: str, text: str, prompt: str) -> None:
    """Raises: RowProblem for a turn whose text the prompt does not hold."""
    if not _holds_turn(prompt, text):
        raise RowProblem(
            "turn_not_in_template", f"the chat template leaves out a turn of the {role}: {excerpt(text)!r}"
        )


def _holds_turn(prompt: str, text: str) -> bool:
    """True if the prompt holds a turn's text; of a tool's answer in JSON, which templates rewrite, its texts."""
    if holds(prompt, text):
        return True
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and all(holds(prompt, leaf) for leaf in leaves(value))
