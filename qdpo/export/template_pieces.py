"""A chat template as fixed pieces of text around the turns, found by rendering marked conversations.

Ollama has templates of its own (Go's text/template) and reads no Jinja. Most chat templates only put fixed text around
each turn; that text is found here, and what it gives is compared with the template itself on other conversations.
"""

import json
import os.path
from dataclasses import dataclass
from typing import Any

from qdpo.errors import ConfigError, VerificationError

Turns = list[dict[str, str]]
SYSTEM, FIRST, ANSWER, SECOND = "⟦system⟧", "⟦first⟧", "⟦answer⟧", "⟦second⟧"


@dataclass(frozen=True, kw_only=True)
class TurnText:
    """The text before and after each turn; a user's turn is always followed by the beginning of an answer."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    # Stands before an answer that is there, but not before one that is to be written.
    before_answer: str
    after_answer: str
    # Stands first in a conversation without a system message: an own default message, or what opens the first turn.
    without_system: str
    takes_system: bool

    def render(self, turns: Turns) -> str:
        """The text of a conversation up to where the next answer begins."""
        text = "" if turns[0]["role"] == "system" else self.without_system
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_user, self.after_user),
            "assistant": (self.before_answer, self.after_answer),
        }
        for turn in turns:
            before, after = around[turn["role"]]
            text += before + turn["content"] + after
        return text

    def go_template(self) -> str:
        """The same as one line for Ollama. Every piece is a quoted string: nothing in it can act as template."""
        content = "{{ .Content }}"
        # A model without system messages gets none; its own template would raise an error.
        system = f"{_go(self.before_system)}{content}{_go(self.after_system)}" if self.takes_system else ""
        user = f"{_go(self.before_user)}{content}{_go(self.after_user)}"
        answer = f"{_go(self.before_answer)}{content}{_go(self.after_answer)}"
        opening = _go(self.without_system)
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{opening}{{{{ end }}}}' if opening else ""
        return (
            f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}'
            f'{{{{ else if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        )


def _go(text: str) -> str:
    """A Go template action that prints `text`. JSON's escapes are Go's, apart from those of surrogate pairs."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turn_text(tokenizer: Any) -> TurnText:
    """The pieces of the tokenizer's chat template.

    A beginning-of-text token that the tokenizer adds by itself is left out, since the server adds it, too.
    Raises: ConfigError without a template; VerificationError if it is more than fixed text around turns.
    """
    if not tokenizer.chat_template:
        raise ConfigError("The model has no chat template, so no Modelfile can be made. Add chat_template.jinja to it.")
    user = {"role": "user", "content": FIRST}
    more = [user, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": SECOND}]
    before, after_user = _parts(_render(tokenizer, [user]), FIRST)
    opening, between, after_answer, last = _parts(_render(tokenizer, more), FIRST, ANSWER, SECOND)
    system = _system_parts(tokenizer, user)
    starts = [before, after_answer] + ([system[1]] if system else [])
    before_user = os.path.commonprefix([start[::-1] for start in starts])[::-1]
    cut = -len(before_user) or None
    found = TurnText(
        before_system=system[0] if system else "",
        after_system=system[1][:cut] if system else "",
        before_user=before_user,
        after_user=after_user,
        before_answer=between[len(after_user) :],
        after_answer=after_answer[:cut],
        without_system=before[:cut],
        takes_system=system is not None,
    )
    if opening != before or last != after_user or not between.startswith(after_user):
        raise _not_fixed("a second turn changes the text of the first")
    _check(found, tokenizer)
    return found


def _system_parts(tokenizer: Any, user: dict[str, str]) -> tuple[str, str] | None:
    """Text before and after the system message; None for a template that refuses it."""
    from jinja2 import TemplateError

    try:
        text = _render(tokenizer, [{"role": "system", "content": SYSTEM}, user])
    except TemplateError:
        return None
    before, after, _last = _parts(text, SYSTEM, FIRST)
    return before, after


def _parts(text: str, *marks: str) -> list[str]:
    """The text around the marks, which must all be there, once, in this order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise _not_fixed(f"{mark} is left out or repeated")
        parts.append(part)
    return [*parts, text]


def _render(tokenizer: Any, turns: Turns) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    begin = tokenizer.bos_token
    adds = begin is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if adds else text


def _check(found: TurnText, tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": 'It is {{ "4" }}.\n\nReally: """4""" \\ %d'},
        {"role": "user", "content": "naïve 東京 🚀\nsecond line"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "bye"},
    ]
    conversations = [talk[:1], talk[:3], talk]
    if found.takes_system:
        system = {"role": "system", "content": "Answer in one word."}
        conversations += [[system, *turns] for turns in conversations]
    for turns in conversations:
        if found.render(turns) != _render(tokenizer, turns):
            raise _not_fixed(f"a conversation of {len(turns)} messages comes out differently")


def _not_fixed(reason: str) -> VerificationError:
    return VerificationError(
        f"The model's chat template is more than fixed text around turns ({reason}), and Ollama cannot take it over. "
        "Serve the model with vLLM or llama.cpp, which read the template itself (--to vllm, --to gguf)."
    )
