"""The form in which a checkpoint stores its weights, as its config.json states it. No torch.

Apart from plain numbers three forms are read: 4-bit bitsandbytes, which stays as it is, and two that makers ship as
their only original, which are dequantised while loading:

- fp8: a number of 8 bits (E4M3) for each weight, and a scale for each block of rows and columns, or for each tensor.
  transformers' FineGrainedFP8Config; DeepSeek V3 has blocks of 128x128, Ministral 3 one scale a tensor.
- mxfp4: two numbers of 4 bits (E2M1) in a byte, and a power of two for each 32 of them (OCP Microscaling Formats 1.0).
  transformers' Mxfp4Config; the experts of gpt-oss.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from qdpo.errors import ConfigError

BITSANDBYTES, FP8, MXFP4 = "bitsandbytes", "fp8", "mxfp4"
KEY = "quantization_config"
SOURCE = "Copy config.json from the model's source."
# Of FineGrainedFP8Config, where a config.json does not say; null there means one scale a tensor.
DEFAULT_BLOCK = (128, 128)
KEPT = ("modules_to_not_convert", "ignored_layers")
LONGEST_NAME, MOST_NAMES, MOST_PATTERNS = 300, 20_000, 200
# The last parts of a quantised model's name.
_ENDING = re.compile(
    r"[-_.](gptq|awq|aqlm|hqq|exl[23]|eetq|autoround|fp8|nvfp4|mxfp[48]|int[2-8]|w\da\d+|[2-8]-?bits?|bnb|quantized|"
    r"dynamic|block|static|marlin|g\d+|sym|ct)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class StoredForm:
    """The form of the weights that a config.json calls quantised."""

    method: str
    """BITSANDBYTES, FP8 or MXFP4."""
    block: tuple[int, int] | None = None
    """FP8: rows and columns that share a scale; None for one scale a tensor."""
    kept: tuple[str, ...] = ()
    """Names and patterns of modules whose weights are plain."""

    @property
    def is_dequantised(self) -> bool:
        """True if loading makes plain weights of it; 4-bit bitsandbytes stays what it is."""
        return self.method != BITSANDBYTES

    @property
    def words(self) -> str:
        """The form in a few words: FP8 with a scale for each 128x128 weights."""
        if self.method == MXFP4:
            return "MXFP4"
        if self.method == BITSANDBYTES:
            return "4-bit bitsandbytes"
        return f"FP8 with a scale for each {self.block[0]}x{self.block[1]} weights" if self.block else "FP8"

    def keeps(self, module: str) -> bool:
        """True if the config calls this module plain.

        A name of the list is the module's, a part of it, or that of a module around it; `*` matches any text. The
        list has the names of the whole model, of which files may leave out the first part.
        """
        parts = module.split(".")
        spans = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
        literal, patterns = _kept_names(self.kept)
        return not literal.isdisjoint(spans) or any(fnmatchcase(span, one) for one in patterns for span in spans)


@lru_cache
def _kept_names(names: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names without and with a `*`. transformers reads regular expressions, of which only `.*` is seen in use."""
    bare = [name.removeprefix("model.").replace(".*", "*") for name in names]
    patterns = (re.sub(r"([?[])", r"[\1]", name) for name in bare if "*" in name)
    return frozenset(name for name in bare if "*" not in name), tuple(patterns)


def stored_form(config: Any, owner: str, name: str = "") -> StoredForm | None:
    """The form of the weights; None where they are plain.

    `owner` opens the message: "The folder …" or "The repository …"; `name` is the model's, to name its original by.
    Raises: ConfigError for a form that is not read, or is not described well.
    """
    quantised = settings_of(config)
    if quantised is None:
        return None
    if not isinstance(quantised, Mapping):
        raise ConfigError(
            f"{owner} (from model.path): {KEY} in config.json is {quantised!r:.60}, not an object. {SOURCE}"
        )
    bits = [bit for bit in ("load_in_4bit", "load_in_8bit") if quantised.get(bit)]
    method = quantised.get("quant_method") or (BITSANDBYTES if bits else "unknown")
    if method == BITSANDBYTES and bits == ["load_in_4bit"]:
        return StoredForm(BITSANDBYTES)
    if method == MXFP4:
        return StoredForm(MXFP4, kept=_kept(quantised, owner))
    if method == FP8:
        _check_fp8(quantised, owner)
        return StoredForm(FP8, _block(quantised, owner), _kept(quantised, owner))
    shown = "8-bit bitsandbytes" if method == BITSANDBYTES else method
    raise ConfigError(
        f"{owner} (from model.path) is quantised with {shown}, but qdpo trains over 4-bit weights that it makes "
        f"itself, of 16-bit ones or of what makers ship (FP8, MXFP4). Use the unquantised original{_original(name)}."
    )


def settings_of(config: Any) -> Any:
    """The value of quantization_config, which a multimodal config may hold in its text part."""
    text = config.get("text_config")
    inner = text.get(KEY) if isinstance(text, Mapping) else None
    return inner if config.get(KEY) is None else config[KEY]


def without_settings(config: Any) -> Any:
    """The config of the same model with plain weights."""
    plain = {key: value for key, value in config.items() if key != KEY}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return plain


def _original(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2]
    bare = last
    while (shorter := _ENDING.sub("", bare)) != bare:
        bare = shorter
    if bare and bare != last:
        return f": it is probably {bare!r}, by the model's maker"
    return ": its name is often this one without the ending, such as -GPTQ, -AWQ or -Int4"


def _check_fp8(quantised: Mapping[str, Any], owner: str) -> None:
    for key, known in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        value = quantised.get(key)
        if value not in (None, known):
            raise ConfigError(
                f"{owner} (from model.path): {key} in {KEY} of config.json is {value!r:.40}; of FP8 checkpoints qdpo "
                f"reads {known} alone. Use a 16-bit copy of this model."
            )


def _block(quantised: Mapping[str, Any], owner: str) -> tuple[int, int] | None:
    value = quantised.get("weight_block_size", DEFAULT_BLOCK)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(
            f"{owner} (from model.path): weight_block_size in {KEY} of config.json is {value!r:.60}, not two whole "
            f"numbers of at least 1. {SOURCE}"
        )
    return value[0], value[1]


def _kept(quantised: Mapping[str, Any], owner: str) -> tuple[str, ...]:
    key = next((key for key in KEPT if quantised.get(key) is not None), None)
    names = quantised[key] if key else []
    if isinstance(names, list) and all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names):
        if len(names) <= MOST_NAMES and sum("*" in name for name in names) <= MOST_PATTERNS:
            return tuple(names)
    raise ConfigError(
        f"{owner} (from model.path): {key} in {KEY} of config.json is {names!r:.60}, not a list of module names. "
        f"{SOURCE}"
    )
