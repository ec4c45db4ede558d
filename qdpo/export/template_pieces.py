"""Reduces a chat template to fixed pieces of text around the turns, found by rendering marked conversations.

Ollama has its own templates (Go's text/template) and does not read Jinja. Most chat templates only put fixed text
around each turn. That text is found here, and its result is compared with the template itself on other conversations.
"""

import json
import os.path
from dataclasses import dataclass
from typing import Any

from qdpo.data.tokens.template_bounds import TemplateFault, render
from qdpo.errors import ConfigError, VerificationError

Turns = list[dict[str, str]]
SYSTEM, FIRST, ANSWER, SECOND = "⟦system⟧", "⟦first⟧", "⟦answer⟧", "⟦second⟧"


@dataclass(frozen=True, kw_only=True)
class TurnText:
    """The text before and after each turn; a user turn is always followed by the beginning of an answer."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    # Precedes an existing answer, but not an answer to be generated.
    before_answer: str
    after_answer: str
    # Opens a conversation without a system message: the template's default message, or the start of the first turn.
    without_system: str
    takes_system: bool

    def render(self, turns: Turns) -> str:
        """The text of a conversation up to the beginning of the next answer."""
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
        """The same as a one-line template for Ollama. Every piece is a quoted string, so its text is not evaluated."""
        content = "{{ .Content }}"
        # A model without system messages gets none, where its own template would raise an error.
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
    """A Go template action that prints `text`. JSON's escapes are valid in Go, except those of surrogate pairs."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turn_text(tokenizer: Any) -> TurnText:
    """The pieces of the tokenizer's chat template.

    A beginning-of-text token that the tokenizer adds by itself is left out, since the server adds it too.
    Raises: ConfigError without a template; VerificationError if the template is more than fixed text around turns.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "The run has no chat template: it was trained on bare text, so it takes no chats and no Modelfile. Serve "
            "it as a text completer with vLLM or llama.cpp (`--to vllm`, `--to gguf`), or train with a data.template."
        )
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
    """Text before and after the system message; None if the template refuses it."""
    try:
        text = _render(tokenizer, [{"role": "system", "content": SYSTEM}, user])
    except VerificationError:
        return None
    before, after, _last = _parts(text, SYSTEM, FIRST)
    return before, after


def _parts(text: str, *marks: str) -> list[str]:
    """The text around the marks, each of which must appear exactly once, in this order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise _not_fixed(f"{mark} is left out or repeated")
        parts.append(part)
    return [*parts, text]


def _render(tokenizer: Any, turns: Turns) -> str:
    try:
        text = render(tokenizer, turns, None, add_generation_prompt=True)
    except TemplateFault as fault:
        raise _not_fixed(f"it does not take every conversation: {fault}") from None
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
            raise _not_fixed(f"a conversation of {len(turns)} messages renders differently")


def _not_fixed(reason: str) -> VerificationError:
    return VerificationError(
        f"The model's chat template is more than fixed text around turns ({reason}), so Ollama cannot express it. "
        "Serve the model with vLLM or llama.cpp, which read the template itself (`--to vllm`, `--to gguf`)."
    )
