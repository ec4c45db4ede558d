"""The text of an answer: what the model writes behind its prompt, up to the token at which generation stops.

prompt + answer is what a server would have produced: the prompt as it opens the answer, then the answer's thought,
text and tool calls as the template writes them, and its end.
"""

import json
import os.path
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qdpo.data.layouts.pair import Message
from qdpo.data.layouts.turns import RowProblem, excerpt
from qdpo.data.tokens import thoughts
from qdpo.data.tokens.chat import ChatTemplate
from qdpo.data.tokens.hide import special_tokens
from qdpo.data.tokens.same_text import holds, holds_value, leaves, parting
from qdpo.data.tokens.templates import end_token
from qdpo.settings.schema import Reasoning

UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")


@dataclass(frozen=True)
class Asked:
    """The conversation that an answer follows: the turns, the functions, and both as the prompt's text."""

    turns: list[Message]
    tools: list[Any] | None
    prompt: str
    place: str
    """A character that occurs in no message."""


@dataclass
class Answers:
    """Writes answers. `note` receives each observation about the template, by name and with an example."""

    chat: ChatTemplate
    reasoning: Reasoning
    note: Callable[[str, str], None]
    _afters: set[str] = field(default_factory=set)
    """Texts that the template has written behind an answer."""

    def write(self, asked: Asked, answer: Message) -> tuple[str, list[tuple[str, str]]]:
        """The answer's text with its end, and what was changed. Raises: RowProblem if it cannot be written."""
        inline = thoughts.inline(answer["content"])
        if inline is not None and (beside := answer.get("reasoning_content", "").strip()):
            if inline.thought == beside:  # the same thought twice
                answer = {name: value for name, value in answer.items() if name != "reasoning_content"}
            else:
                answer, inline = _with_one_thought(answer, inline, beside), None
        if inline is not None:
            verbatim = self._inline(asked, answer, inline)
            if isinstance(verbatim, str):
                return verbatim, []
            answer = verbatim
        thought = answer.get("reasoning_content", "")
        written = self._as_template_writes(asked, answer)
        if not thought or (self._has_thought(written, answer) and not thoughts.is_closed(asked.prompt)):
            self._check(written, answer)
            return self._checked_thought(asked, answer, written), []
        return self._unwritten_thought(asked, answer)

    def apart(self, answer: Message) -> Message:
        """The answer with its thought apart, where the thought's tags are special tokens, and so no text."""
        inline = None if "reasoning_content" in answer else thoughts.inline(answer["content"])
        special = special_tokens(self.chat.tokenizer)
        if inline is None or not inline.thought or not (special.search(inline.close) or special.search(inline.open)):
            return answer
        return {**answer, "content": inline.rest, "reasoning_content": inline.thought}

    def _has_thought(self, written: str, answer: Message) -> bool:
        """True if the template has written the thought, and before the answer: its words may be in the answer, too."""
        if self.chat.thought_form is None:
            return False
        after = answer["content"].strip() or next((name for name, _arguments in calls(answer)), "")
        place = written.rfind(after) if after else -1
        return holds(written[:place] if place >= 0 else written, answer["reasoning_content"])

    def _inline(self, asked: Asked, answer: Message, inline: thoughts.Inline) -> str | Message:
        """An answer that holds its thought in its text: its final text, or the message with the thought apart."""
        opened = thoughts.opened(asked.prompt)
        has_calls = "tool_calls" in answer
        if opened is not None and opened[1] == inline.close and not has_calls:
            text = inline.from_thought
            if inline.is_open and asked.prompt.endswith("\n"):
                text = text.removeprefix("\n")
            return text + self._end(asked)
        apart = {**answer, "content": inline.rest, "reasoning_content": inline.thought}
        if thoughts.is_closed(asked.prompt) or opened is not None:
            return apart if inline.thought else {**answer, "content": inline.rest}
        knows_tag = self.chat.names(inline.close)
        if knows_tag and inline.is_open and not has_calls:
            text = f"{answer['content']}{self._end(asked)}"
            if not self.chat.apply([*asked.turns, answer], asked.tools).startswith(asked.prompt + text):
                self.note("thinking_kept", excerpt(answer["content"]))
            return text
        return apart if knows_tag or self.chat.thought_form is not None else answer

    def _unwritten_thought(self, asked: Asked, answer: Message) -> tuple[str, list[tuple[str, str]]]:
        """The answer with a thought that the template does not write: in an open thought, else by the setting."""
        thought, plain = answer["reasoning_content"], {k: v for k, v in answer.items() if k != "reasoning_content"}
        closing = self._closing(asked.prompt)
        if closing and not thoughts.is_closed(asked.prompt):
            written = self._as_template_writes(asked, plain)
            self._check(written, plain)
            rest = thoughts.without_closed(written)
            return f"{thought.strip()}{closing}{rest.removeprefix(closing).lstrip()}", []
        written = self._as_template_writes(asked, plain)
        empty = thoughts.starts_closed(written)
        closed = thoughts.is_closed(asked.prompt)
        if (filled := thoughts.filled(empty, thought)) and not closed:
            self._check(written, plain)
            return filled + written[len(empty) :], []
        what = f"the chat template does not write the thought {excerpt(thought)!r}"
        if closed and self.reasoning != "ignore":
            raise RowProblem(  # tags of its own would be a second thought behind the closed one
                "reasoning_not_in_template",
                f"{what} after this prompt (its switches turn thinking off). data.reasoning=ignore leaves it out; with "
                "thinking on (data.template_options) it is trained",
            )
        before, note = by_setting(self.reasoning, thought, what)
        self._check(written, plain)
        return (before + written.lstrip() if before else written), [note]

    def _as_template_writes(self, asked: Asked, answer: Message) -> str:
        full = self.chat.apply([*asked.turns, answer], asked.tools)
        return self._to_end(asked, full, self._behind_prompt(asked, full), answer)

    def _behind_prompt(self, asked: Asked, full: str) -> str:
        """The text that the template writes behind the prompt, without what the prompt has already opened."""
        prompt = asked.prompt
        if full.startswith(prompt):
            return full[len(prompt) :]
        last = asked.turns[-1]["content"].strip()
        question = prompt.rfind(last)
        shared = os.path.commonprefix([prompt, full])
        unfinished = UNFINISHED_TAG.search(shared)
        shared = shared[: unfinished.start()] if unfinished else shared
        if len(shared) < question + len(last) if question >= 0 else not self._same_question(asked, shared):
            return self._behind_changed_prompt(asked, full, prompt[max(question, 0) :])
        own, rest = prompt[len(shared) :], full[len(shared) :]
        if not own.strip():
            return rest
        if thoughts.is_closed(own):
            return thoughts.without_closed(rest).lstrip("\n") if own.endswith("\n") else thoughts.without_closed(rest)
        if thoughts.opened(own):
            bare = thoughts.without_opening(rest)
            return bare.removeprefix("\n") if bare != rest and own.endswith("\n") else bare
        if self.chat.opens_in_words:
            return rest
        return self._behind_changed_prompt(asked, full, prompt[max(question, 0) :])

    def _same_question(self, asked: Asked, shared: str) -> bool:
        """True if the shared text holds all turns; for a last turn whose text the template rewrites."""
        return shared.startswith(self.chat.apply(asked.turns, asked.tools).rstrip())

    def _behind_changed_prompt(self, asked: Asked, full: str, tail: str) -> str:
        """As above, where the template changes earlier turns once an answer follows: the prompt stays as it is."""
        before, found, after = self._frame(asked)
        _earlier, same_end, space = before.rpartition(tail)
        if not full.startswith(before) or not found:
            raise _rerendered(asked.prompt, full)
        if not same_end or space.strip():
            bare_before, bare_tail, bare_prompt = ("".join(text.split()) for text in (before, tail, asked.prompt))
            if not (bare_before.endswith(bare_tail) or bare_prompt.startswith(bare_before)):
                raise _rerendered(asked.prompt, full)
            space = ""
        self.note("prompt_kept", parting(asked.prompt, before))
        return space + full[len(before) :]

    def _to_end(self, asked: Asked, full: str, rest: str, answer: Message) -> str:
        """`rest` up to the token at which generation stops."""
        content, is_text = answer["content"].strip(), not answer.get("tool_calls")
        after = next((one for one in sorted(self._afters, key=len, reverse=True) if one and full.endswith(one)), None)
        if after is None and is_text:
            after = self._frame(asked)[2]
            self._afters.add(after)
            if not full.endswith(after):
                raise RowProblem("template_changes_answer", f"the template changes the answer: {excerpt(content)!r}")
        if after is not None and len(after) <= len(rest):
            return rest[: len(rest) - len(after)] + self._stop(after)
        eos = end_token(self.chat.tokenizer)
        said = [rest.rfind(text) for name, arguments in calls(answer) for text in (name, *leaves(arguments))]
        if (place := rest.find(eos, max([0, *said]))) >= 0:
            return rest[: place + len(eos)]
        if not special_tokens(self.chat.tokenizer).search(self._frame(asked)[2]):
            return rest.rstrip() + eos
        places = [match.start() for match in special_tokens(self.chat.tokenizer).finditer(rest)]
        return self._until(rest, places[-1] if places else len(rest))

    def _checked_thought(self, asked: Asked, answer: Message, written: str) -> str:
        """The text, with an open thought closed at once if the answer has none."""
        empty = thoughts.starts_closed(written)
        closing = self._closing(asked.prompt)
        if answer.get("reasoning_content"):
            return written
        if closing and not thoughts.is_closed(asked.prompt) and not empty and closing.strip() not in written:
            self.note("thought_closed", closing)
            return closing + written.lstrip()
        if empty:
            self.note("empty_thought", empty)
        elif written[: max(written.find(answer["content"].strip()), 0)].strip():
            self.note("text_before_answer", written[: written.find(answer["content"].strip())])
        return written

    def _closing(self, prompt: str) -> str:
        """The text that closes a thought which the prompt has opened; empty if it has opened none."""
        opened = thoughts.opened(prompt)
        form = self.chat.thought_form
        if opened is not None:
            if form is not None and opened[1] in form.between:
                return form.between
            return f"\n{opened[1]}\n\n" if prompt.endswith("\n") else opened[1]
        return form.between if form is not None and self.chat.opens_in_words else ""

    def _check(self, written: str, answer: Message) -> None:
        """Raises: RowProblem if the text or a tool call of the answer is not in what the template writes."""
        content = answer["content"]
        if content.strip() and not holds(written, content):
            words = special_tokens(self.chat.tokenizer).sub("", thoughts.without_closed(written)).strip()
            if not words:
                raise RowProblem("answer_not_in_template", f"of {excerpt(content)!r} the template writes only the end")
            raise RowProblem("template_changes_answer", f"the template changes the answer: {parting(content, written)}")
        for name, arguments in calls(answer):
            missing = [text for text in (name, *leaves(arguments)) if not holds_value(written, text)]
            if missing:
                raise RowProblem(
                    "answer_not_in_template",
                    f"the chat template does not write the call of {name!r} ({excerpt(missing[0])!r} is missing), so "
                    "the answer would lose it. Use a model whose template has tool calls",
                )

    def _end(self, asked: Asked) -> str:
        """The end of an answer to this prompt."""
        return self._stop(self._frame(asked)[2])

    def _frame(self, asked: Asked) -> tuple[str, str, str]:
        """The conversation's text before and after an answer."""
        frame = self.chat.apply([*asked.turns, {"role": "assistant", "content": asked.place}], asked.tools)
        before, found, after = frame.partition(asked.place)
        if not found:
            raise _rerendered(asked.prompt, frame)
        return before, found, after

    def _stop(self, after: str) -> str:
        """The beginning of the text behind an answer, up to the token at which generation stops."""
        return self._until(after, 0)

    def _until(self, text: str, start: int) -> str:
        """`text` up to the end of the first special tokens from place `start`; if there are none, EOS is added."""
        pattern, eos = special_tokens(self.chat.tokenizer), end_token(self.chat.tokenizer)
        match = pattern.search(text, start)
        if match is None:
            return text.rstrip() + eos
        place = text.find(eos, match.start())
        if place >= 0 and pattern.sub("", text[match.end() : place]).strip():
            return text[: place + len(eos)]  # the first one closes a part of the answer
        end = match.end()
        while text[end - len(eos) : end] != eos and (following := pattern.match(text, end)):
            end = following.end()
        # The rest is never generated: a line break, or the header of a turn that some templates always open.
        return text[: end if not pattern.sub("", text[end:]).strip() else match.end()]


def by_setting(reasoning: Reasoning, thought: str, what: str) -> tuple[str, tuple[str, str]]:
    """The text before an answer whose thought has no place, and a note; `what` says why it has none.

    Raises: RowProblem `reasoning_not_in_template` with data.reasoning=drop.
    """
    if reasoning == "drop":
        raise RowProblem(
            "reasoning_not_in_template", f"{what}. data.reasoning=train writes it in <think> tags, ignore leaves it out"
        )
    if reasoning == "ignore":
        return "", ("reasoning_not_in_template", f"{what}: it was left out")
    note = ("reasoning_not_in_template", f"{what}: it was put before the answer in <think> tags")
    return f"<think>\n{thought.strip()}\n</think>\n\n", note


def _with_one_thought(answer: Message, inline: thoughts.Inline, beside: str) -> Message:
    """An answer with a thought next to its text and another in it, as one thought."""
    if not inline.is_open:
        return answer
    return {**answer, "content": inline.rest, "reasoning_content": f"{beside}\n\n{inline.thought}".strip()}


def _rerendered(prompt: str, full: str) -> RowProblem:
    return RowProblem(
        "template_rerenders_prompt",
        f"the template changes the prompt if an answer follows: {parting(prompt, full)}",
    )


def calls(answer: Message) -> Iterator[tuple[str, Any]]:
    """Name and arguments of each tool call of an answer."""
    for call in answer.get("tool_calls") or ():
        inner = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(inner, dict):
            yield str(inner.get("name")), _parsed(inner.get("arguments"))


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
