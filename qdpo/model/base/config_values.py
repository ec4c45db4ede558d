"""Bounds on the values of a model's config.json, so that nothing absurd is built from them."""

import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from qdpo.errors import ConfigError
from qdpo.families.config_fields import experts_field

COUNTS = {
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads",
    "n_head", "n_heads", "attention_heads", "vocab_size",
}  # fmt: skip
"""Whole numbers of at least 1 wherever they occur."""
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"}
SIZES = re.compile(r"(^|_)(size|dim|heads?|layers?|experts?|positions?|embeddings?|embd|inner|rank|groups?|state)$")
"""Keys whose value, where it is one number, is a size: at least -1, which some families use for none."""
CHOICES = {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
"""Keys by which transformers takes a function from its registry, or one with a slash from the hub."""
FROM_THE_END = re.compile(r"(^|_)(feature|select)_layers?$")
"""Keys of towers that name a layer, counted from the last one where the number is negative."""
CHOSEN = ("num_experts_per_tok", "top_k_experts")
"""Keys for the number of experts that see a token."""
LARGEST_SIZE = 2**31
LARGEST_NUMBER = 2**63
LONGEST_TEXT = 1_000_000
DTYPES = {"float32", "float16", "bfloat16", "float64", "auto", "float", "half", "double"}
MOST_DEPTH = 30


def check_values(config: dict[str, Any], owner: str, *, tensors: int | None = None) -> None:
    """Raises: ConfigError for a value that no model has, with its key.

    `tensors` is the number of tensors that are stored, of which each layer needs one.
    """
    for path, key, value in _leaves(config, owner):
        named = f"{owner}: {path} in config.json"
        if isinstance(value, float) and not math.isfinite(value) and "quant" not in path:
            raise ConfigError(f"{named} is {value}, not a finite number. {SOURCE}")
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise ConfigError(f"{named} is a number of {len(str(abs(value))[:4000])} digits. {SOURCE}")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ConfigError(f"{named} is a text of {len(value):,} characters. {SOURCE}")
        if key in CHOICES and isinstance(value, str) and "/" in value:
            raise ConfigError(
                f"{named} is {value!r:.60}, compiled code to download from the hub, which is not run. Remove that line "
                "from config.json: the model's own attention computes the same."
            )
        if key in COUNTS and not (_is_whole(value) and 1 <= value <= LARGEST_SIZE) and value is not None:
            raise ConfigError(f"{named} is {value!r:.60}, not a whole number of at least 1. {SOURCE}")
        if SIZES.search(key) and not FROM_THE_END.search(key) and value is not None:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(value, str) and re.fullmatch(r"\s*[-+.\deE]+\s*", value):
                raise ConfigError(f"{named} is the text {value!r:.60}, not a number. {SOURCE}")
            if is_number and not -1 <= value <= LARGEST_SIZE:
                raise ConfigError(f"{named} is {value!r:.60}, which is not a size. {SOURCE}")
        if key in LAYERS and tensors is not None and isinstance(value, int) and value > tensors:
            raise ConfigError(
                f"{named} is {value:,}, but the weights are only {tensors:,} tensors, too few for so many layers. "
                f"{SOURCE}"
            )
    _check_experts(config, owner)
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and value.removeprefix("torch.") in DTYPES):
            raise ConfigError(
                f"{owner}: {key} in config.json is {value!r:.60}, which is not a type of weights. {SOURCE}"
            )
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{owner}: architectures in config.json is {names!r:.60}, not a list of names. {SOURCE}")


SOURCE = "Copy config.json from the model's source."


def _check_experts(config: dict[str, Any], owner: str) -> None:
    """A token is for one expert at least, and for no more than there are."""
    text = config.get("text_config")
    for one, at in ((config, ""), (text, "text_config.")):
        name = experts_field(one) if isinstance(one, dict) else None
        if name is None or not isinstance(one, dict):
            continue
        for key in CHOSEN:
            chosen = one.get(key)
            if _is_whole(chosen) and not 1 <= chosen <= one[name]:
                raise ConfigError(
                    f"{owner}: {at}{key} in config.json is {chosen}, and {at}{name} {one[name]}: a token is for at "
                    f"least one expert, and for no more than there are. {SOURCE}"
                )


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _leaves(config: dict[str, Any], owner: str) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything that is neither an object nor a list; a list's items have the list's path."""
    left: list[tuple[str, str, Any, int]] = [("", "", config, 0)]
    while left:
        path, key, value, depth = left.pop()
        if depth > MOST_DEPTH:
            raise ConfigError(f"{owner}: {path[:80]} in config.json is nested {depth} deep. {SOURCE}")
        if isinstance(value, dict):
            dotted = f"{path}." if path else ""
            left.extend((f"{dotted}{name}", str(name), item, depth + 1) for name, item in value.items())
        elif isinstance(value, list):
            if key in COUNTS:
                yield path, key, value
            left.extend((path, "", item, depth + 1) for item in value)
        else:
            yield path, key, value
