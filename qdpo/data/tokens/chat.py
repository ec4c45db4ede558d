"""A tokenizer's chat template with the run's switches: how it wants tool calls and thoughts, learnt by trial."""

import json
import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qdpo.data.layouts.pair import Message
from qdpo.data.layouts.turns import RowProblem
from qdpo.data.tokens import thoughts
from qdpo.data.tokens.template_bounds import TemplateFault, probe_template, render
from qdpo.data.tokens.templates import QUESTION, Options
from qdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED: Message = {"role": "user", "content": QUESTION}
THOUGHT, ANSWER = "Tqdpo", "Aqdpo"
CALL = {"name": "fqdpo", "arguments": {"kqdpo": "vqdpo wqdpo"}}
FUNCTION = {
    "type": "function",
    "function": {
        "name": "fqdpo",
        "description": "dqdpo",
        "parameters": {"type": "object", "properties": {"kqdpo": {"type": "string"}}, "required": ["kqdpo"]},
    },
}
Fields = Callable[[str, Any], dict[str, Any]]
# Where templates look for a thought: the first is transformers' own name, the last the typed parts of a content.
THOUGHT_FORMS: tuple[Fields, ...] = (
    lambda thought, content: {"reasoning_content": thought, "content": content},
    lambda thought, content: {"thinking": thought, "content": content},
    lambda thought, content: {"reasoning": thought, "content": content},
    lambda thought, content: {
        "content": [{"type": "thinking", "thinking": thought}, *([{"type": "text", "text": content}] * bool(content))]
    },
)


@dataclass(frozen=True)
class ThoughtForm:
    """The form in which a template takes a thought: fields of the message, and the text between thought and answer."""

    fields: Fields
    between: str


@dataclass(frozen=True)
class CallForm:
    """The form in which a template takes a tool call: arguments as text or as an object, inside `function` or not."""

    takes_text: bool
    takes_object: bool
    nested: bool
    without_content: bool
    """A call is written only in a message whose content is null."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template and its switches."""

    tokenizer: "PreTrainedTokenizerBase"
    options: Options = field(default_factory=dict)

    def apply(self, turns: list[Message], tools: list[Any] | None, *, opens: bool = False) -> str:
        """The conversation's text; with `opens`, up to where the model's answer begins.

        Raises: RowProblem if the template refuses the conversation.
        """
        given = [self._as_taken(turn) for turn in turns]
        try:
            return self._render(given, tools, opens)
        except TemplateFault as fault:
            if fault.bound or (not fault.refused and self._is_broken):
                raise ConfigError(
                    f"The chat template of {self.tokenizer.name_or_path!r} cannot be used: {fault}. Take the model's "
                    "own template from its source, or give another with data.template=FILE."
                ) from None
            roles = [turn["role"] for turn in turns]
            offer = "; data.merge_same_role=true joins turns of one role" * any(map(str.__eq__, roles, roles[1:]))
            raise RowProblem("template_refuses", f"{fault} (turns: {', '.join(roles)}{offer})") from None

    @cached_property
    def _is_broken(self) -> bool:
        """True if the template fails for plain conversations as well, with functions and without."""
        try:
            probe_template(self.tokenizer, **self.options)
        except TemplateFault:
            return not self._tried([ASKED], [FUNCTION], opens=True)
        return False

    def names(self, word: str) -> bool:
        """True if the word occurs in the template's source."""
        source = self.tokenizer.chat_template
        sources = source.values() if isinstance(source, dict) else [source]
        return any(word in str(one) for one in sources)

    @cached_property
    def thought_form(self) -> ThoughtForm | None:
        """The form in which the template takes thoughts, found by trying each; None if it writes none of them."""
        for fields in THOUGHT_FORMS:
            text = self._tried([ASKED, {"role": "assistant", **fields(THOUGHT, ANSWER)}])
            _before, found, rest = text.partition(THOUGHT)
            between, written, _after = rest.partition(ANSWER)
            as_python = "'thinking'" in text or '"thinking"' in text  # the list of parts, written out
            if found and written and text.count(THOUGHT) == 1 and not as_python:
                return ThoughtForm(fields, between)
        return None

    @cached_property
    def call_form(self) -> CallForm | None:
        """The form in which the template takes tool calls, found by trying each; None if it writes none of them."""
        for content, nested in (("", True), ("", False), (None, True), (None, False)):
            as_object = self._call_text(CALL, nested, content)
            as_text = self._call_text({**CALL, "arguments": json.dumps(CALL["arguments"])}, nested, content)
            takes_object = "vqdpo wqdpo" in as_object and "'kqdpo'" not in as_object
            takes_text = "vqdpo wqdpo" in as_text and r"\"kqdpo" not in as_text
            if takes_object or takes_text:
                return CallForm(takes_text, takes_object, nested, content is None)
        return None

    @cached_property
    def opens_in_words(self) -> bool:
        """True if the template opens a thought with words instead of a tag, as Apriel's does."""
        prompt = self._tried([ASKED], opens=True)
        whole = self._tried([ASKED, {"role": "assistant", "content": ANSWER}])
        own = prompt.removeprefix(os.path.commonprefix([prompt, whole]))
        has_tag = thoughts.opened(own) is not None or thoughts.is_closed(own)
        return self.thought_form is not None and bool(own.strip()) and not has_tag

    def _call_text(self, call: dict[str, Any], nested: bool, content: str | None) -> str:
        made = {"type": "function", "id": "call00001"} | ({"function": call} if nested else call)
        turns = [ASKED, {"role": "assistant", "content": content, "tool_calls": [made]}]
        answered = {"role": "tool", "tool_call_id": "call00001", "name": "fqdpo", "content": "rqdpo"}
        # Some templates write a call only together with its result.
        text = self._tried(turns, [FUNCTION]) or self._tried([*turns, answered], [FUNCTION])
        return text[text.rfind(QUESTION) :]  # before it stand the functions

    def _tried(self, turns: list[Message], tools: list[Any] | None = None, *, opens: bool = False) -> str:
        try:
            return self._render(turns, tools, opens)
        except TemplateFault:
            return ""

    def _as_taken(self, turn: Message) -> Message:
        """The turn with its thought and its tool calls in the forms that the template takes."""
        if "tool_calls" in turn:
            turn = {**turn, "tool_calls": [self._call(call) for call in turn["tool_calls"]]}
            if self.call_form is not None and self.call_form.without_content and not turn["content"]:
                turn = {**turn, "content": None}
        if "reasoning_content" in turn and self.thought_form is not None:
            others = {name: value for name, value in turn.items() if name not in ("reasoning_content", "content")}
            turn = {**others, **self.thought_form.fields(turn["reasoning_content"], turn["content"])}
        return turn

    def _call(self, call: Any) -> Any:
        form = self.call_form
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if form is None or not isinstance(inner, Mapping):
            return call
        inner = {name: value for name, value in inner.items() if name not in ("type", "id")}
        arguments = inner.get("arguments")
        if isinstance(arguments, str) and not form.takes_text:
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise RowProblem(
                    "bad_tool_call", f"the arguments of {inner.get('name')!r} are text that is not JSON: {arguments!r}"
                ) from None
            inner = {**inner, "arguments": parsed}
        elif arguments is not None and not isinstance(arguments, str) and not form.takes_object:
            inner = {**inner, "arguments": json.dumps(arguments, ensure_ascii=False)}
        beside = {name: value for name, value in call.items() if name in ("type", "id")}
        return {**beside, "function": inner} if form.nested else {**beside, **inner}

    def _render(self, turns: list[Message], tools: list[Any] | None, opens: bool) -> str:
        return render(self.tokenizer, turns, tools, add_generation_prompt=opens, **self.options)
