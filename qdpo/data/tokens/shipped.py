"""The chat template that a run ships: the trained one with its switches as defaults, or the plain format as one."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Switch = bool | str | int | float
# What callers of a template pass themselves, and words that Jinja reads otherwise.
TAKEN = frozenset(
    "messages tools documents add_generation_prompt continue_final_message bos_token eos_token pad_token unk_token "
    "raise_exception strftime_now true false none True False None and or not in is if else elif loop self super "
    "varargs kwargs caller namespace range dict set".split()
)
PLAIN = (
    "<<bos>>{%- for message in messages -%}"
    "{%- if not loop.first %}{{ '\\n\\n' }}{% endif -%}"
    "{%- if message['role'] == 'user' %}{{ 'Human: ' }}"
    "{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' }}"
    "{%- elif message['role'] == 'tool' %}{{ 'Tool: ' }}{% endif -%}"
    "{{ message['content'] }}"
    "{%- if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif -%}"
)
PLAIN_ANSWER = "\n\nAssistant:"


def shipped_template(source: str, options: Mapping[str, Switch]) -> str:
    """The template with the trained switches as defaults: a server that passes none renders what was trained.

    A server that passes one still decides it. The line break after the block is removed by every renderer of chat
    templates (trim_blocks), and lets the template's own first line begin a line.
    Raises: ConfigError for a name that cannot be a switch, or a value that is not true, false, a text or a number.
    """
    blocks = []
    for name, value in options.items():
        if not name.isidentifier() or not name.isascii() or name in TAKEN:
            raise ConfigError(f"data.template_options: {name!r} cannot be a switch of a chat template. Leave it out.")
        blocks.append(f"{{%- set {name} = {name} if {name} is defined else {_literal(name, value)} %}}\n")
    return "".join(blocks) + source


def _literal(name: str, value: Switch) -> str:
    """The value in Jinja, whose texts have JSON's escapes except those of surrogate pairs."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) or value - value == 0:  # neither infinite nor "not a number"
        return repr(value) if value >= 0 else f"({value!r})"
    raise ConfigError(f"data.template_options.{name}={value!r} cannot be written into a chat template. Give a number.")


def plain_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The format of data.template=plain for conversations ("Human: … Assistant: …") as a chat template.

    Chat templates write BOS themselves, plain text gets it from the tokenizer.
    """
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return PLAIN.replace("<<bos>>", "{{ bos_token }}" if adds else "")
