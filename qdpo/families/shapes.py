"""The shape of a model, which determines memory and time: from a config.json or by a model's name. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.families import known, traced
from qdpo.families.config_fields import experts_field, is_tied, json_object, positions
from qdpo.families.family import FAMILIES, WITH_FORECAST, Family, LayerForm
from qdpo.families.known import ModelFacts
from qdpo.families.stored_form import stored_form
from qdpo.families.traced import TracedShape

SOURCE = "Copy config.json from the model's source."
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
    def product_weights(self) -> float:
        """Multiplications per token in all layers."""
        return self.linear_weights

    @property
    def expert_weights(self) -> int:
        """Numbers of experts in 4 bits: models with a formula have none."""
        return 0

    def met_weights(self, _tokens: float) -> float:
        """Numbers of the experts that a row meets."""
        return 0.0

    @property
    def table_weights(self) -> int:
        """Weights of the embedding table; the head has as many, unless the two are tied."""
        return self.vocabulary * self.hidden


AnyShape = Shape | TracedShape


# Makes the traced shape of a config.json that comes from a source, or says why it cannot.
FindTrace = Callable[[Mapping[str, Any], str], TracedShape]


def from_config(
    config: Mapping[str, Any], source: str, *, like: str | None = None, trace: FindTrace | None = None
) -> AnyShape:
    """The shape that a config.json describes. `source` names its origin; `like` overrides its family.

    By formula for families that have one; else from the traces that ship with qdpo, else by `trace`.
    Raises: ConfigError for a model that none of them knows, and for missing numbers.
    """
    name = like or (config.get("text_config") or config).get("model_type")
    family = FAMILIES.get(str(name))
    if like is not None and (family is None or family.layer is None):
        raise ConfigError(f"--like={like} has no formula. Give one of {', '.join(WITH_FORECAST)}.")
    text = config.get("text_config") or config
    if family is not None and family.layer is not None and experts_field(text) is None:
        return _by_formula(config, family, family.layer, source)
    found = traced.shipped(traced.key_of(config))
    if found is None and trace is None:
        raise ConfigError(
            f"There is no forecast for model_type={name!r} of {source} without a trace of its layers. `qdpo plan` and "
            "`qdpo run` make it."
        )
    if found is None and trace is not None:
        found = trace(config, source)
    longest = positions(config)
    assert found is not None
    return replace(found, positions=longest.count if longest else None)


def _by_formula(config: Mapping[str, Any], family: Family, layer: LayerForm, source: str) -> Shape:
    whole, config = config, {**family.defaults, **(config.get("text_config") or config)}
    missing = [name for name in NEEDED if not isinstance(config.get(name), int) or config[name] <= 0]
    if missing:
        raise ConfigError(
            f"{source} lacks {', '.join(missing)}, so there is no forecast. Add it to the config.json under the name "
            "that transformers uses."
        )
    for name in ("num_key_value_heads", "head_dim"):
        value = config.get(name)
        if value is not None and not (type(value) is int and value > 0):
            raise ConfigError(f"{source}: {name} is {value!r:.60}, not a whole number of at least 1. {SOURCE}")
    heads, longest = config["num_attention_heads"], positions(config)
    return Shape(
        layer=layer,
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


def known_shape(name: str, *, like: str | None = None, trace: FindTrace | None = None) -> AnyShape:
    """The shape of a model that ships; its positions are no more than the maker states.

    Raises: ConfigError for a name that is not known, and as from_config.
    """
    facts = known.facts(name)
    source = f"the config.json of {facts.name} that ships with qdpo"
    return _within_context(from_config(known.config_of(name), source, like=like, trace=trace), facts)


def _within_context(shape: AnyShape, facts: ModelFacts) -> AnyShape:
    stated = [count for count in (shape.positions, facts.context) if count is not None]
    return replace(shape, positions=min(stated, default=None))


def of_model(
    path: str, *, revision: str | None = None, like: str | None = None, trace: FindTrace | None = None
) -> tuple[AnyShape, str]:
    """The shape of model.path and its source: the config.json of a folder or a cached model, or the known shapes.

    Raises: ConfigError, with a remedy, if nothing on this machine describes the model.
    """
    config = _config_file(path, revision)
    name = None if Path(path).expanduser().exists() else known.known_name(path)
    if config is not None:
        content = _content(config)
        stored_form(content, str(config), path)  # a plan for weights that a run refuses would be of no use
        _check_text_type(content, config)
        shape = from_config(content, str(config), like=like, trace=trace)
        return shape if name is None else _within_context(shape, known.facts(name)), str(config)
    if name is not None:
        return known_shape(name, like=like, trace=trace), f"the config.json of {name} that ships with qdpo"
    near = known.near_names(path)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"No config.json of model.path={path} is on this machine, and none of it ships with qdpo.{hint} `qdpo plan "
        "--fetch` downloads that file alone, a few KB; or put it into a folder and give that folder as model.path: no "
        "weights are needed for a plan."
    )


def config_here(path: str, revision: str | None) -> Any:
    """The content of the config.json that `of_model` would read, or that ships with qdpo; None if there is none."""
    file, name = _config_file(path, revision), known.known_name(path)
    if file is not None:
        return _content(file)
    return None if name is None else known.config_of(name)


def _content(file: Path) -> dict[str, Any]:
    content = json_object(file, SOURCE)
    if not isinstance(content.get("text_config", {}), dict | None):
        raise ConfigError(
            f"{file} (from model.path): text_config is {content['text_config']!r:.60}, not an object. {SOURCE}"
        )
    return content


def _check_text_type(content: Mapping[str, Any], file: Path) -> None:
    """Refuses a text part under another family's name than transformers builds, where that is known without it."""
    outer, text = content.get("model_type"), content.get("text_config") or {}
    built = f"{outer}_text"
    if built in known.text_types() and text.get("model_type", built) != built:
        raise ConfigError(
            f"{file} (from model.path): model_type of text_config is {text['model_type']!r:.60}, but transformers "
            f"builds {built!r} for a {outer} model. {SOURCE}"
        )


def _config_file(path: str, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    config = folder / "config.json" if folder.is_dir() else cached_file(path, "config.json", revision)
    return config if config is not None and config.is_file() else None


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
