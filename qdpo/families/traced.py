"""A model as its list of layers, of few kinds, each with bytes that were found by tracing that layer. No torch.

`model.trace.layers` makes one from a config, `forecast.composed` puts its layers together. All bytes are those of a
16-bit compute type, a 4-bit base and an adapter of rank `RANK`.
"""

import dataclasses
import functools
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

RANK = 16
# Bytes of the compute type in the traces.
ELEMENT = 2
# Traces that were made by another version are not used: raise it when a trace counts or decides something anew.
VERSION = 5
# Traces of the models that people use, each under the digests of its config.json and of transformers' reading of it.
SHIPPED = Path(__file__).with_name("traces.json")
# Sizes of the traces: tokens of a row, or of a sequence where answers are computed one by one (whole chunks of any
# recurrent layer); the share of prompts among them; pairs, where the number of pairs matters.
TOKENS = (128, 512, 1024, 2048, 4096, 16384)
SEQUENCES = (256, 512, 1024, 2048, 4096)
SHARES = (1 / 16, 15 / 16)
PAIRS = (1, 4)
# Fields of a config that change neither the size of a tensor nor the code that runs.
_NAMES = {
    "_name_or_path", "architectures", "auto_map", "dtype", "initializer_range", "max_position_embeddings",
    "quantization_config", "rms_norm_eps", "rope_theta", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """Bytes of one layer at one row size, on top of those that are there when it begins its forward pass."""

    stays: float
    """What is left when the next layer begins: kept for the backward pass, or handed on."""
    forward: float
    """The most during its forward pass."""
    backward: float
    """The most during its backward pass, when all behind it is gone."""

    @property
    def values(self) -> tuple[float, float, float]:
        return self.stays, self.forward, self.backward

    def toward(self, other: "Moments", share: float) -> "Moments":
        """The moments at a share of the way to `other`, or beyond it."""
        pairs = zip(self.values, other.values, strict=True)
        return Moments(*(here + share * (there - here) for here, there in pairs))

    def plus(self, stays: float, forward: float, backward: float) -> "Moments":
        return Moments(self.stays + stays, self.forward + forward, self.backward + backward)

    def times(self, factor: float) -> "Moments":
        return Moments(*(factor * value for value in self.values))


NOTHING = Moments(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Traces:
    """Moments by row size: at [tokens][share of prompts][pairs]; one share or one number of pairs: no difference."""

    at: tuple[tuple[tuple[Moments, ...], ...], ...]
    sizes: tuple[int, ...] = TOKENS
    chunk: int = 1
    """A recurrent layer fills its last chunk up to so many tokens."""
    token: Moments = NOTHING
    """Bytes of a token that begins no chunk."""

    def of(self, tokens: float, prompts: float, pairs: float) -> Moments:
        """The moments of a row: between traced sizes on a line, beyond them on that line or on its bend."""
        share = (prompts / max(tokens, 1) - SHARES[0]) / (SHARES[1] - SHARES[0])
        points, sizes = [self._of_share(place, share, pairs) for place in range(len(self.at))], self.sizes
        filled = math.ceil(tokens / self.chunk) * self.chunk if self.chunk > 1 else tokens
        high = min(max(bisect_right(sizes, filled), 1), len(sizes) - 1)
        low = high - 1
        found = points[low].toward(points[high], (filled - sizes[low]) / (sizes[high] - sizes[low]))
        if filled > sizes[-1]:
            found = found.plus(*_bends(points, sizes, filled))
        return found.plus(*self.token.times(tokens - filled).values)

    def _of_share(self, place: int, share: float, pairs: float) -> Moments:
        by_pairs = [_line(one, PAIRS, pairs) for one in self.at[place]]
        return by_pairs[0] if len(by_pairs) == 1 else by_pairs[0].toward(by_pairs[1], share)


def _line(traces: Sequence[Moments], sizes: Sequence[int], pairs: float) -> Moments:
    """Along the length of a sequence, which falls with the number of pairs; more pairs count as the most traced."""
    if len(traces) == 1:
        return traces[0]
    inverse = 1 / min(max(pairs, sizes[0]), sizes[1])
    return traces[1].toward(traces[0], (inverse - 1 / sizes[1]) / (1 / sizes[0] - 1 / sizes[1]))


def _bends(points: Sequence[Moments], sizes: Sequence[int], tokens: float) -> list[float]:
    """Bytes above the last line for what grows with the square of the tokens, from the last three traces."""
    first, second, third = sizes[-3:]
    found = []
    for one, two, three in zip(*(point.values for point in points[-3:]), strict=True):
        bend = ((three - two) / (third - second) - (two - one) / (second - first)) / (third - first)
        found.append(max(0.0, bend) * (tokens - second) * (tokens - third))
    return found


@dataclass(frozen=True)
class ExpertStack:
    """Matrices of a layer's experts that are stored in 4 bits."""

    experts: int
    numbers: int
    """Of each matrix."""
    chosen: int
    """Experts that a token meets."""

    def met(self, tokens: float) -> float:
        """Experts that are met by any of so many tokens, if each token takes them at random."""
        missed: float = (1 - min(self.chosen / self.experts, 1.0)) ** tokens
        return self.experts * (1 - missed)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a layer, or of everything outside the layers except the tables."""

    four_bit: tuple[int, ...] = ()
    """Numbers of each matrix that is stored in 4 bits."""
    stacks: tuple[ExpertStack, ...] = ()
    """Experts in 4 bits."""
    dense: int = 0
    """Numbers that stay in the compute type: norms, convolutions, routers, experts of other forms."""
    experts: int = 0
    """Those of `dense` that belong to experts."""
    adapted: int = 0
    """Trained numbers per adapter rank."""
    low: int = 0
    """Adapted layers, each of which keeps one number per token and rank."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Layers that are built alike."""

    name: str
    weights: Weights
    products: float
    """Multiplications per token in the forward pass, without attention scores and adapter."""
    kept: Traces
    recomputed: Traces


@dataclass(frozen=True, kw_only=True)
class TracedShape:
    """A model whose layers were traced."""

    key: str
    kinds: tuple[LayerKind, ...]
    order: tuple[int, ...]
    """The place in `kinds` of each layer."""
    shared: bool
    """A prompt is computed once for both of its answers; else each answer has its own copy, a sequence at a time."""
    states: bool
    """Layers carry a state from token to token, or are not attention in another way: packages of kernels exist."""
    hidden: int
    vocabulary: int
    tied: bool
    tables: int
    """Numbers of all embedding tables and the head, each once."""
    outside: Weights
    before: Traces
    """From the token ids to the first layer."""
    after: Traces
    """From the last layer to the last hidden states, and back from the head, if all layers are kept."""
    after_recomputed: Traces
    """The same if any layer is recomputed: what is handed from layer to layer then lives on for its second pass."""
    positions: int | None = field(default=None, compare=False)

    @property
    def layers(self) -> int:
        return len(self.order)

    @property
    def table_weights(self) -> int:
        """Weights of the embedding table; the head has as many, unless the two are tied."""
        return self.vocabulary * self.hidden

    @cached_property
    def copies(self) -> int:
        """Hidden states that a layer hands on per token: of Gemma 3n four, of all others one."""
        size = self.kinds[0].recomputed.sizes[-1]
        return int(self.kinds[0].recomputed.of(size, 0, 1).stays / (ELEMENT * size * self.hidden)) or 1

    @cached_property
    def weights(self) -> tuple[Weights, ...]:
        """The weights of every layer, and those outside of them."""
        return (*(self.kinds[place].weights for place in self.order), self.outside)

    @cached_property
    def linear_weights(self) -> int:
        """All weights except the tables and experts in 4 bits."""
        return sum(sum(one.four_bit) + one.dense for one in self.weights)

    @cached_property
    def stacks(self) -> tuple[ExpertStack, ...]:
        """The experts in 4 bits of all layers."""
        return tuple(stack for one in self.weights for stack in one.stacks)

    @cached_property
    def expert_weights(self) -> int:
        """All numbers of experts in 4 bits."""
        return sum(stack.experts * stack.numbers for stack in self.stacks)

    def met_weights(self, tokens: float) -> float:
        """Numbers of the experts that a row of so many tokens meets."""
        return sum(stack.met(tokens) * stack.numbers for stack in self.stacks)

    @cached_property
    def product_weights(self) -> float:
        """Multiplications per token in all layers: of experts only those that a token meets."""
        return sum(self.kinds[place].products for place in self.order)


def key_of(config: Mapping[str, object]) -> str:
    """The name of a config's trace: a digest of the values of its text part that can change it."""
    part = config.get("text_config")
    text: Mapping[str, object] = part if isinstance(part, Mapping) else config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    kept = {
        name: value
        for name, value in {**text, "tie_word_embeddings": tied}.items()
        if value is not None and name not in _NAMES and not name.endswith("_token_id")
    }
    described = json.dumps([config.get("model_type"), kept], sort_keys=True, default=str)
    return hashlib.sha256(f"{VERSION} {described}".encode()).hexdigest()[:16]


@functools.cache
def _ships() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    return content if content.get("version") == VERSION else {}


@functools.cache
def shipped(key: str) -> TracedShape | None:
    """The trace of this name that ships with qdpo, or None."""
    ships = _ships()
    place = ships.get("keys", {}).get(key)
    return None if place is None else from_json(ships["shapes"][place])


_AROUND = ("before", "after", "after_recomputed")


def to_json(shape: TracedShape) -> dict[str, Any]:
    """The shape in plain values; `from_json` reads it."""
    plain = dataclasses.asdict(shape)
    for kind in plain["kinds"]:
        kind["kept"], kind["recomputed"] = _packed(kind["kept"]), _packed(kind["recomputed"])
    return plain | {name: _packed(plain[name]) for name in _AROUND}


def _packed(traces: Mapping[str, Any]) -> dict[str, Any]:
    at = [[[[round(one[name]) for name in one] for one in pairs] for pairs in shares] for shares in traces["at"]]
    return {**traces, "at": at, "token": list(traces["token"].values())}


def _unpacked(packed: Mapping[str, Any]) -> Traces:
    at = tuple(tuple(tuple(Moments(*one) for one in pairs) for pairs in shares) for shares in packed["at"])
    return Traces(at, tuple(packed["sizes"]), packed["chunk"], Moments(*packed["token"]))


def _weights(plain: Mapping[str, Any]) -> Weights:
    stacks = tuple(ExpertStack(**one) for one in plain["stacks"])
    return Weights(**{**plain, "four_bit": tuple(plain["four_bit"]), "stacks": stacks})


def from_json(plain: Mapping[str, Any]) -> TracedShape:
    """The shape that `to_json` wrote. Raises: KeyError, TypeError or ValueError for anything else."""
    kinds = tuple(
        LayerKind(
            name=kind["name"], weights=_weights(kind["weights"]), products=kind["products"],
            kept=_unpacked(kind["kept"]), recomputed=_unpacked(kind["recomputed"]),
        )
        for kind in plain["kinds"]
    )  # fmt: skip
    rest = {
        name: plain[name] for name in ("key", "shared", "states", "hidden", "vocabulary", "tied", "tables", "positions")
    }
    return TracedShape(
        kinds=kinds, order=tuple(plain["order"]), outside=_weights(plain["outside"]),
        before=_unpacked(plain["before"]), after=_unpacked(plain["after"]),
        after_recomputed=_unpacked(plain["after_recomputed"]), **rest,
    )  # fmt: skip


def to_text(shape: TracedShape) -> str:
    """The shape as the text of a file; `from_text` reads it."""
    return json.dumps(to_json(shape)) + "\n"


def from_text(text: str) -> TracedShape:
    """The shape that `to_text` wrote. Raises: KeyError, TypeError, ValueError or RecursionError for any other text."""
    return from_json(json.loads(text))
