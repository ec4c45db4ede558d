"""Facts about conversations in the tokenizer files of a folder: chat templates, end token, vocabulary.

Reads JSON and Jinja files alone, so that a folder of another kit, with a tokenizer class that transformers does not
know, can be read as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError

Template = str | dict[str, str]
"""A chat template, or several by name, of which `default` is the one for plain conversations."""
CONFIG, SPECIAL, VOCABULARY, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "added_tokens.json",
)
JINJA, MORE, PROCESSOR = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder's chat template and end token, each None where the files do not state it."""

    template: Template | None
    eos: str | None


def has_tokenizer(folder: Path) -> bool:
    """True if the folder holds a tokenizer's settings or a chat template."""
    return any((folder / name).exists() for name in (CONFIG, VOCABULARY, JINJA, PROCESSOR))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that `read_tokenizer_files` and `vocabulary_of` read."""
    names = (CONFIG, SPECIAL, VOCABULARY, ADDED, JINJA, PROCESSOR, GENERATION)
    more = sorted((folder / MORE).glob("*.jinja"))
    return [path for path in (*(folder / name for name in names), *more) if path.is_file()]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Raises: ConfigError naming a file that cannot be read."""
    config = _object(folder / CONFIG)
    eos = _token(config.get("eos_token")) or _token(_object(folder / SPECIAL).get("eos_token"))
    return TokenizerFiles(_template(folder, config), eos)


def _template(folder: Path, config: Mapping[str, Any]) -> Template | None:
    """The templates in the order in which transformers looks for them: files, then the settings."""
    found: dict[str, Any] = {path.stem: _text(path) for path in sorted((folder / MORE).glob("*.jinja"))}
    if (folder / JINJA).is_file():
        found["default"] = _text(folder / JINJA)
    elif not found:
        stated = config.get("chat_template") or _object(folder / PROCESSOR).get("chat_template")
        if isinstance(stated, list):
            found = {str(one.get("name")): one.get("template") for one in stated if isinstance(one, dict)}
        elif stated is not None:
            found = {"default": stated}
    wrong = [name for name, source in found.items() if not isinstance(source, str)]
    if wrong or (found and "default" not in found):
        problem = f"{wrong[0]!r} is not text" if wrong else f"there are only {', '.join(found)}, and no default"
        raise ConfigError(f"The chat templates in {folder} cannot be used: {problem}. Save the tokenizer again.")
    return found["default"] if len(found) == 1 else found or None


def jinja_in(folder: Path) -> str | None:
    """The text of chat_template.jinja, or None if there is none. Raises: ConfigError."""
    return _text(folder / JINJA) if (folder / JINJA).is_file() else None


def vocabulary_of(folder: Path) -> dict[str, int]:
    """The tokens that the folder's files give an id; empty if they give none. Raises: ConfigError."""
    found: dict[str, int] = {}
    content = _object(folder / VOCABULARY)
    try:
        words = (content.get("model") or {}).get("vocab") or {}
        listed = {word[0]: place for place, word in enumerate(words)} if isinstance(words, list) else dict(words)
        found |= {str(word): int(place) for word, place in listed.items()}
        found |= {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []}
        found |= {str(word): int(place) for word, place in _object(folder / ADDED).items()}
        decoder = _object(folder / CONFIG).get("added_tokens_decoder") or {}
        found |= {str(token["content"]): int(place) for place, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The tokenizer files in {folder} are damaged ({type(error).__name__}: {error}). Save the tokenizer again."
        ) from error
    return found


def stated_ends(folder: Path, *names: str) -> list[int]:
    """The end tokens that generation_config.json and config.json (or `names`) state, by id. Raises: ConfigError."""
    stated = [_stated_end(_object(folder / name)) for name in names or (GENERATION, "config.json")]
    ids = [one for value in stated for one in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(one for one in ids if isinstance(one, int) and not isinstance(one, bool)))


def _stated_end(config: Mapping[str, Any]) -> Any:
    """The end token of a config, or where it states none, of its text part: as transformers generates by it."""
    text = config.get("text_config")
    own = config.get("eos_token_id")
    return text.get("eos_token_id") if own is None and isinstance(text, dict) else own


def write_conversation(folder: Path, *, template: Template | None, eos: str | None) -> None:
    """Puts the template and the end token into the folder's tokenizer files, in the place of their own."""
    if (folder / CONFIG).is_file() or eos is not None:
        config = _object(folder / CONFIG)
        config.pop("chat_template", None)
        if eos is not None and _token(config.get("eos_token")) != eos:
            config["eos_token"] = eos
        _write(folder / CONFIG, config)
    special = _object(folder / SPECIAL)
    if eos is not None and _token(special.get("eos_token")) not in (None, eos):
        _write(folder / SPECIAL, {**special, "eos_token": eos})
    (folder / PROCESSOR).unlink(missing_ok=True)
    for path in (folder / JINJA, *(folder / MORE).glob("*.jinja")):
        path.unlink(missing_ok=True)
    sources = {"default": template} if isinstance(template, str) else template or {}
    for name, source in sources.items():
        (folder / MORE).mkdir(exist_ok=True) if name != "default" else None
        path = folder / JINJA if name == "default" else folder / MORE / f"{name}.jinja"
        path.write_bytes(source.encode("utf-8"))  # write_text would change line ends on some systems


def write_ends(folder: Path, ends: Sequence[int], *, base: Path) -> None:
    """Writes the generation_config.json of the folder `base`, with these ends. Raises: ConfigError."""
    settings = _object(base / GENERATION)
    _write(folder / GENERATION, {**settings, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)})


def sampling_settings(folder: Path) -> dict[str, float]:
    """The switches and numbers of generation_config.json by name; empty without the file. Raises: ConfigError."""
    content = _object(folder / GENERATION)
    return {name: value for name, value in content.items() if isinstance(value, int | float)}


def _token(value: Any) -> str | None:
    """A token in a tokenizer's settings: a text, or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}. Save the tokenizer again.") from error


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file. Raises: ConfigError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Save the tokenizer again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object. Save the tokenizer again.")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
