"""The chat template of a run: the tokenizer's own, a built-in one, or a file; and warnings about the template."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from qdpo.data.tokens.shipped import TAKEN, Switch
from qdpo.data.tokens.template_bounds import LONGEST_TEMPLATE, TemplateFault, render
from qdpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{{ bos_token if bos_token and not bos_token == '<|im_start|>' else '' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "<<end>>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
OWN = ("chatml", "llama3")
QUESTION = "Qqdpo"
Options = Mapping[str, Switch]
"""The template's switches, as in data.template_options."""
RESERVED = TAKEN | {
    "tokenize", "chat_template", "conversation", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""What apply_chat_template takes for itself."""
DATES = ("strftime_now", "date_string")


def settle_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> str | None:
    """Set the tokenizer's template to the one in `data.template`; return a sentence for the user if it changed.

    Raises: ConfigError for a file that does not exist, or a template whose tokens the tokenizer lacks.
    """
    if template in ("auto", "plain"):
        return None
    if template == "llama3":
        _need_tokens(tokenizer, "llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
        source = LLAMA3
    elif template == "chatml":
        end = "<|im_end|>" if _is_token(tokenizer, "<|im_end|>") else end_token(tokenizer)
        source = CHATML.replace("<<end>>", "{{ '" + end.replace("'", "\\'") + "' }}")
    else:
        source = _from_file(template)
    if tokenizer.chat_template == source:
        return None
    had = "replacing its own" if tokenizer.chat_template else "which had none"
    tokenizer.chat_template = source
    return (
        f"data.template={template}: set in the tokenizer, {had}, and saved with the adapter. Serve the model with this "
        "template: with another template it would see prompts that it was not trained on."
    )


def uses_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """True if rows are rendered with the tokenizer's chat template."""
    return template != "plain" and bool(tokenizer.chat_template)


def end_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that ends a text. Raises: DataError if there is none."""
    if not tokenizer.eos_token:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so the model could not learn to end "
            "an answer. Set eos_token in its tokenizer_config.json."
        )
    return str(tokenizer.eos_token)


def check_options(tokenizer: "PreTrainedTokenizerBase", template: str, options: Options) -> None:
    """Raises: ConfigError for a switch that the chat template does not have, or if rows are rendered without one."""
    if options and not uses_chat_template(tokenizer, template):
        name = next(iter(options))
        why = "data.template=plain" if template == "plain" else f"{tokenizer.name_or_path!r} has no chat template"
        raise ConfigError(
            f"data.template_options.{name}: there is no chat template to switch ({why}). {_way_out(name)}"
        )
    source = tokenizer.chat_template
    sources = [str(one) for one in (source.values() if isinstance(source, dict) else [source])]
    for name in options:
        if name in RESERVED or not any(re.search(rf"\b{re.escape(name)}\b", one) for one in sources):
            known = sorted(set().union(*map(_switches, sources)) - RESERVED)
            raise ConfigError(
                f"data.template_options.{name}: the chat template of {tokenizer.name_or_path!r} has no such switch. It "
                f"reads: {', '.join(known) or 'none'}. {_way_out(name)}"
            )


def _way_out(name: str) -> str:
    return f"Give `data.template_options.{name}=`, with nothing after the =, which also unsets a preset's."


def _switches(source: str) -> set[str]:
    """The names that a template reads and does not set itself."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (TemplateError, RecursionError):
        return set()
    return find_undeclared_variables(parsed)


def template_warnings(tokenizer: "PreTrainedTokenizerBase", template: str, options: Options) -> list[str]:
    """Warnings about text that the template adds to every prompt: a system message of its own, or today's date."""
    if not uses_chat_template(tokenizer, template):
        return []
    warnings, source = [], tokenizer.chat_template
    try:
        text = render(tokenizer, [{"role": "user", "content": QUESTION}], None, add_generation_prompt=True, **options)
    except TemplateFault:  # such rows will be dropped one by one, with the template's message
        return []
    before = re.sub(r"<[^<>]*>(system|user|assistant|model)?|\[/?\w+\]", " ", str(text).split(QUESTION)[0])
    own = " ".join(before.split())
    if len(own.split()) > 3:
        warnings.append(
            "the chat template puts text of its own before every conversation without a system message: "
            f"{own[:120]!r}. It is trained on, as it will be served; data.system=… replaces it"
        )
    if any(word in str(source) for word in DATES):
        warnings.append(
            "the chat template writes a date into prompts. The token ids of this run are stored once, with today's "
            "date, and a resumed run does not change them"
        )
    return warnings


def _from_file(template: str) -> str:
    path = Path(template).expanduser()
    try:
        is_file = path.is_file()
    except OSError:  # a name that is too long
        is_file = False
    if not is_file:
        raise ConfigError(
            f"data.template={template} is neither auto, plain, {', '.join(OWN)} nor a file. Give the path of a Jinja "
            "chat template, such as a model's chat_template.jinja."
        )
    try:
        if path.stat().st_size > 4 * LONGEST_TEMPLATE:
            raise ConfigError(
                f"data.template={template} has {path.stat().st_size:,} bytes: no chat template is so long."
            )
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"data.template={template} cannot be read as UTF-8 text: {error}.") from None


def _need_tokens(tokenizer: "PreTrainedTokenizerBase", name: str, tokens: tuple[str, ...]) -> None:
    missing = [token for token in tokens if not _is_token(tokenizer, token)]
    if missing:
        raise ConfigError(
            f"data.template={name} needs the tokens {', '.join(tokens)}, but the tokenizer {tokenizer.name_or_path!r} "
            f"lacks {', '.join(missing)}. Use data.template=chatml, which works with any tokenizer, or plain."
        )


def _is_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    return text in {token.content for token in tokenizer.added_tokens_decoder.values()}
