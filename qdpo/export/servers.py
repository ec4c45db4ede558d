"""Makes an Ollama Modelfile and a vLLM command for the trained model, and catches their silent mistakes."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdpo import __version__
from qdpo.errors import ConfigError
from qdpo.export.template_pieces import turn_text
from qdpo.model.base.tokenizer_files import JINJA, sampling_settings, stated_ends

# The values that vLLM accepts for --max-lora-rank (read in vllm/config/lora.py; vLLM itself was never run here).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def command(*words: object) -> str:
    """A shell command with every word quoted where it needs to be."""
    return " ".join(shlex.quote(str(word)) for word in words)


def modelfile(tokenizer: Any, folder: Path, *, source: str, adapter: str | None, ends: Sequence[int] = ()) -> str:
    """An Ollama Modelfile for `source` (a file in its folder, a folder or a name), with the tokenizer's template.

    It stops at `ends`, and at those that the tokenizer and `folder` state.
    Raises: ConfigError for a text that a Modelfile cannot quote; VerificationError for a template it cannot express.
    """
    turns = turn_text(tokenizer)
    lines = [f"# Made by qdpo {__version__}.", f"FROM {_value(source)}"]
    if adapter:
        lines.append(f"ADAPTER {_value(adapter)}")
    lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stop_texts(tokenizer, folder, ends)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(folder).items()]
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: Any, folder: Path, ends: Sequence[int] = ()) -> list[str]:
    """The end tokens of the tokenizer, of the folder's settings and in `ends` as text, each once."""
    ids = [tokenizer.eos_token_id, *stated_ends(folder), *ends]
    texts = [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids if token_id is not None]
    return list(dict.fromkeys(text for text in texts if text))


def _sampling(folder: Path) -> dict[str, float]:
    """The sampling settings of generation_config.json, under Ollama's names; do_sample=false is temperature 0."""
    stated = sampling_settings(folder)
    if stated.get("do_sample") is False:  # transformers then ignores what else it says about drawing
        stated = {name: value for name, value in stated.items() if name not in ("top_p", "top_k")} | {"temperature": 0}
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
    return {name: float(stated[key]) for key, name in names.items() if isinstance(stated.get(key), int | float)}


def _value(path: str) -> str:
    """A path for FROM or ADAPTER, whose values extend to the end of the line."""
    if "\n" in path or "\r" in path or '"' in path or path != path.strip() or path.startswith("#"):
        raise ConfigError(f"A Modelfile cannot name the path {path!r}. Rename the folder.")
    return path


def _quoted(text: str) -> str:
    """A Modelfile string. Modelfiles have no escapes, so a text with quotes goes into triple quotes."""
    if '"""' in text or text.endswith('"'):
        raise ConfigError(f"A Modelfile cannot quote {text!r}.")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def lora_rank(rank: int) -> int:
    """The smallest --max-lora-rank for an adapter of this rank. Raises: ConfigError above vLLM's largest."""
    for accepted in VLLM_RANKS:
        if rank <= accepted:
            return accepted
    raise ConfigError(
        f"The adapter has rank {rank}, but vLLM accepts at most {VLLM_RANKS[-1]}. Serve the merged model: `--merged`."
    )


def vllm_merged(merged: Path, name: str, conversation: Sequence[object] = ()) -> str:
    """The command that serves a merged model; `conversation` as `vllm_conversation` gives it."""
    return command("vllm", "serve", merged, "--served-model-name", name, *conversation)


def vllm_adapter(base: Sequence[str], adapter: Path, name: str, rank: int, conversation: Sequence[object] = ()) -> str:
    """The command that serves an adapter over `base` (its name, and options such as --revision)."""
    lora = ["--enable-lora", "--max-lora-rank", lora_rank(rank), "--lora-modules", f"{name}={adapter}"]
    return command("vllm", "serve", *base, *lora, *conversation)


def vllm_conversation(kept: Path, differing: Sequence[str]) -> list[object]:
    """The options that let vLLM read the chat template, the end tokens, or both, in `kept` instead of in the model."""
    template: list[object] = ["--chat-template", kept / JINJA] if "chat template" in differing else []
    return template + (["--generation-config", kept] if "end token" in differing else [])
