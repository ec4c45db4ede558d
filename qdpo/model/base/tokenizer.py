"""Loads a folder's tokenizer: its files are checked, and it is tried once, so that a damaged one is named here."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qdpo.errors import ConfigError
from qdpo.model.base.folder import check_regular, read_json
from qdpo.model.base.foreign import reading
from qdpo.model.base.tokenizer_files import has_tokenizer, read_tokenizer_files

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
OTHER_FILES = ("tokenizer.model", "spiece.model", "merges.txt", "vocab.txt", "tekken.json", "chat_template.jinja")
SPECIAL = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
LONGEST = 64 * 2**20  # bytes of one file
LONGEST_TEMPLATE = 4 * 2**20
LARGEST_ID = 2**24
SAMPLE = "Why? 1 + 1 = 2, naïve 漢字 🙂\n"
WAY_OUT = "Copy or download the tokenizer's files again."


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises: ConfigError if there is none, or its files are damaged."""
    check_tokenizer_files(folder)
    where = f"The model folder {folder} has no usable tokenizer"
    with reading(where, WAY_OUT):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        ids = tokenizer(SAMPLE, add_special_tokens=True)["input_ids"]
        tokenizer.decode(ids)
        special = {name: tokenizer.convert_tokens_to_ids(text) for name, text in tokenizer.special_tokens_map.items()}
        size = len(tokenizer)
    if not tokenizer.chat_template and has_tokenizer(folder):
        tokenizer.chat_template = read_tokenizer_files(folder).template  # a processor's file has it, if any
    if not ids:
        raise ConfigError(f"{where}: it makes no tokens of {SAMPLE!r}. {WAY_OUT}")
    for name, token in special.items():
        if token is None:
            raise ConfigError(
                f"{where}: its {name} {tokenizer.special_tokens_map[name]!r} (tokenizer_config.json) is not a token of "
                f"it. {WAY_OUT}"
            )
    highest = max([size - 1, *ids, *tokenizer.added_tokens_decoder])
    if highest > LARGEST_ID:
        raise ConfigError(f"{where}: it has the id {highest:,}, which no vocabulary reaches. {WAY_OUT}")
    _check_template(tokenizer.chat_template, where)
    return tokenizer


def check_tokenizer_files(folder: Path) -> None:
    """Raises: ConfigError for what is not a regular file, too large, not JSON, or has a value of the wrong type."""
    for name in OTHER_FILES:
        path = folder / name
        if path.is_symlink() or path.exists():
            check_regular(path)
            if (size := path.stat().st_size) > (LONGEST_TEMPLATE if name.endswith(".jinja") else LONGEST):
                raise ConfigError(f"{path} (from model.path) has {size:,} bytes, too many for such a file. {WAY_OUT}")
    found = {
        name: read_json(folder / name)
        for name in JSON_FILES
        if (folder / name).is_symlink() or _is_there(folder / name)
    }
    if "tokenizer.json" in found:
        _check_tokenizer(folder / "tokenizer.json", found["tokenizer.json"])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_config(folder / name, found.get(name, {}))
    for name in ("added_tokens.json", "vocab.json"):
        for text, token in found.get(name, {}).items():
            _check_id(folder / name, text, token)


def _is_there(path: Path) -> bool:
    return path.exists()


def _check_tokenizer(path: Path, content: dict[str, Any]) -> None:
    if not isinstance(content.get("model"), dict):
        raise ConfigError(f"{path} (from model.path): model is {content.get('model')!r:.40}, not an object. {WAY_OUT}")
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise ConfigError(f"{path} (from model.path): added_tokens is {added!r:.40}, not a list. {WAY_OUT}")
    for number, token in enumerate(added):
        key = f"added_tokens[{number}]"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ConfigError(f"{path} (from model.path): {key} is {token!r:.60}, not a token. {WAY_OUT}")
        _check_id(path, f"{key}.id", token.get("id"))
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for text, token in vocabulary.items():
            _check_id(path, f"model.vocab[{text!r:.40}]", token)
    elif not isinstance(vocabulary, list):
        raise ConfigError(f"{path} (from model.path): model.vocab is {vocabulary!r:.40}. {WAY_OUT}")


def _check_config(path: Path, content: dict[str, Any]) -> None:
    for key, value in content.items():
        if key in SPECIAL and value is not None:
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ConfigError(f"{path} (from model.path): {key} is {value!r:.60}, not a token. {WAY_OUT}")
        if key == "model_max_length" and (isinstance(value, bool) or not isinstance(value, (int, float, type(None)))):
            raise ConfigError(f"{path} (from model.path): {key} is {value!r:.60}, not a number. {WAY_OUT}")
        if key == "tokenizer_class" and not isinstance(value, (str, type(None))):
            raise ConfigError(f"{path} (from model.path): {key} is {value!r:.60}, not a name. {WAY_OUT}")
        if key == "added_tokens_decoder":
            if not isinstance(value, dict):
                raise ConfigError(f"{path} (from model.path): {key} is {value!r:.60}, not an object. {WAY_OUT}")
            for token, about in value.items():
                _check_id(path, f"{key}.{token:.40}", int(token) if token.isdecimal() and len(token) < 12 else token)
                if not isinstance(about, dict) or not isinstance(about.get("content"), str):
                    raise ConfigError(f"{path} (from model.path): {key}.{token} is {about!r:.60}. {WAY_OUT}")
        if key == "chat_template":
            _check_template(value, f"{path} (from model.path)")


def _check_id(path: Path, key: str, token: Any) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= LARGEST_ID:
        raise ConfigError(f"{path} (from model.path): {key:.80} is {token!r:.40}, not the id of a token. {WAY_OUT}")


def _check_template(value: Any, where: str) -> None:
    if isinstance(value, list):  # tokenizer_config.json keeps named templates so
        value = {
            str(item.get("name")): item.get("template") if isinstance(item, dict) else item
            for item in value
            if isinstance(item, dict)
        }
    texts = value.values() if isinstance(value, dict) else [value]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{where}: chat_template is {value!r:.60}, not a text. {WAY_OUT}")
        if text is not None and len(text) > LONGEST_TEMPLATE:
            raise ConfigError(f"{where}: chat_template has {len(text):,} characters. {WAY_OUT}")
