"""How to serve what was trained: an Ollama Modelfile, and vLLM's command, with what each would get silently wrong."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdpo import __version__
from qdpo.errors import ConfigError
from qdpo.export.template_pieces import turn_text

# What vLLM takes for --max-lora-rank (vllm/config/lora.py); as read, vLLM itself was never run here.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def command(*words: object) -> str:
    """A shell command with every word quoted where it needs to be."""
    return " ".join(shlex.quote(str(word)) for word in words)


def modelfile(tokenizer: Any, folder: Path, *, source: str, adapter: str | None) -> str:
    """An Ollama Modelfile over `source` (a file beside it, a folder or a name), with the model's own template.

    Raises: ConfigError for a text that a Modelfile cannot quote; VerificationError for a template beyond it.
    """
    turns = turn_text(tokenizer)
    lines = [f"# Made by qdpo {__version__}.", f"FROM {_value(source)}"]
    if adapter:
        lines.append(f"ADAPTER {_value(adapter)}")
    lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stop_texts(tokenizer, folder)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(folder).items()]
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: Any, folder: Path) -> list[str]:
    """The end tokens of tokenizer and generation_config.json as text, each once."""
    stated = _generation(folder).get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    texts = [tokenizer.convert_ids_to_tokens(token_id) for token_id in ids if token_id is not None]
    return list(dict.fromkeys(texts))


def _sampling(folder: Path) -> dict[str, float]:
    """What generation_config.json says of sampling, under Ollama's names."""
    stated = _generation(folder)
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
    return {name: float(stated[key]) for key, name in names.items() if isinstance(stated.get(key), int | float)}


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _value(path: str) -> str:
    """A path for FROM or ADAPTER, which run to the end of the line."""
    if "\n" in path or "\r" in path or '"' in path or path != path.strip() or path.startswith("#"):
        raise ConfigError(f"A Modelfile cannot name the path {path!r}. Rename the folder.")
    return path


def _quoted(text: str) -> str:
    """A string of a Modelfile, which knows no escapes: quotes go into triple quotes."""
    if '"""' in text or text.endswith('"'):
        raise ConfigError(f"A Modelfile cannot quote {text!r}.")
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def lora_rank(rank: int) -> int:
    """The --max-lora-rank under which vLLM takes an adapter. Raises: ConfigError above its largest."""
    for accepted in VLLM_RANKS:
        if rank <= accepted:
            return accepted
    raise ConfigError(
        f"The adapter has rank {rank}, and vLLM takes {VLLM_RANKS[-1]} at most. Serve the merged model: --merged."
    )


def vllm_merged(merged: Path, name: str) -> str:
    """The command that serves a merged model."""
    return command("vllm", "serve", merged, "--served-model-name", name)


def vllm_adapter(base: Sequence[str], adapter: Path, name: str, rank: int) -> str:
    """The command that serves an adapter over `base`: its name, and options such as --revision."""
    lora = ["--enable-lora", "--max-lora-rank", lora_rank(rank), "--lora-modules", f"{name}={adapter}"]
    return command("vllm", "serve", *base, *lora)
