"""Peak memory of a training step by cause, from plain numbers; no torch.

Formulas: what the step keeps for its backward pass, counted tensor by tensor. H hidden width, I intermediate width, T
tokens of a row, e bytes of the compute type.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

GIB = 2**30
# NF4 with double quantisation: 4 bits, a byte a block of 64, a float32 for 256 of these blocks (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Weights, float32 gradients, and the two states of 8-bit or 32-bit AdamW, per trained number.
ADAPTER_BYTES = {"paged_adamw8bit": 4 + 4 + 2, "adamw8bit": 4 + 4 + 2, "adamw": 4 + 4 + 8}


@dataclass(frozen=True)
class Shape:
    """What of an architecture decides its memory."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    """Width of all query heads together; `key` of all key heads."""
    key: int
    vocabulary: int
    tied: bool
    gated: bool = True

    @classmethod
    def of(cls, get: Callable[[str], Any]) -> "Shape":
        """From a function that gives a config's values by transformers' standard names, or None.

        Raises: KeyError naming the value that is missing.
        """

        def need(name: str) -> int:
            value = get(name)
            if not isinstance(value, int) or value <= 0:
                raise KeyError(name)
            return value

        hidden, heads = need("hidden_size"), need("num_attention_heads")
        head = get("head_dim") or hidden // heads
        return cls(
            layers=need("num_hidden_layers"),
            hidden=hidden,
            intermediate=get("intermediate_size") or get("n_inner") or 4 * hidden,
            query=heads * head,
            key=(get("num_key_value_heads") or heads) * head,
            vocabulary=need("vocab_size"),
            tied=bool(get("tie_word_embeddings")),
            gated=get("model_type") not in ("gpt2", "gpt_neox", "starcoder2", "bloom", "falcon", "opt", "phi"),
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's linear layers."""
        attention = [(self.hidden, self.query), (self.hidden, self.key), (self.hidden, self.key)]
        attention.append((self.query, self.hidden))
        into = [(self.hidden, self.intermediate)] * (2 if self.gated else 1)
        return [*attention, *into, (self.intermediate, self.hidden)]

    @property
    def linear_weights(self) -> int:
        """Weights of all adapted layers of the base."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)


@dataclass(frozen=True)
class Row:
    """What of a row of pairs decides its memory: all its tokens, those of its prompts (each once), and its pairs."""

    tokens: int
    prompts: int
    pairs: int = 1


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory."""

    rank: int
    optimizer: str
    quantised: bool
    double_quant: bool = field(default=True, kw_only=True)
    element: int
    """Bytes of the compute type."""
    tile_mib: int
    row_tokens: int = field(default=0, kw_only=True)
    """Tokens of the longest row: its budget, or the longest pair."""
    kept_layers: int
    offload: bool
    cuda: bool


def forecast(shape: Shape, run: Settings) -> dict[str, float]:
    """Bytes on the device at the step's peak, by cause; every row token is taken to be a response token."""
    e, tokens, width = run.element, run.row_tokens, shape.hidden
    weights = shape.linear_weights
    trained = shape.layers * run.rank * sum(inputs + outputs for inputs, outputs in shape.linears)
    layer = 6 * width + 2 * shape.key + 2 * shape.intermediate  # what a kept layer holds a token, lean parts on
    recomputed = shape.layers - run.kept_layers
    on_device = min(recomputed, 3) if run.offload else recomputed
    return {
        "4-bit base" if run.quantised else "base": weights * (NF4_BYTES if run.quantised else e),
        "embeddings and head": shape.vocabulary * width * e * (1 if shape.tied else 2),
        "adapter, gradients, optimizer": trained * ADAPTER_BYTES[run.optimizer],
        "kept layers": e * tokens * layer * run.kept_layers,
        "inputs of recomputed layers": e * tokens * width * on_device,
        "working layer": e * tokens * (10 * width + 3 * shape.intermediate),
        "dequantised weight": 2 * e * max(a * b for a, b in shape.linears) if run.quantised else 0.0,
        "head": run.tile_mib * 2**20 + 2 * e * tokens * width,
        "runtime": 0.7 * GIB if run.cuda else 1.0 * GIB,
    }


@dataclass(frozen=True)
class Choice:
    """Values for memory.tokens_per_row, memory.kept_layers and memory.offload, and the peak that is forecast."""

    tokens_per_row: int
    kept_layers: int
    offload: bool
    peak: float


ROWS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512)
# Tokens whose computing takes as long as dequantising the base once (research on 4090-class cards: 17 % at 1,024).
PASS_TOKENS = 180


def choose(
    shape: Shape,
    run: Settings,
    *,
    limit: float,
    longest: int,
    step_tokens: int,
    rows: int | None,
    kept: int | None,
    offload: bool | None,
) -> Choice:
    """The fastest values under `limit` bytes; what is not None is given and stays.

    `longest` is the longest pair in tokens, `step_tokens` the tokens of a step: longer rows could not be filled. If
    nothing fits, the choice with the lowest peak, which is then above the limit.
    """
    budgets = [rows] if rows is not None else sorted({max(longest, min(r, step_tokens)) for r in ROWS}, reverse=True)
    switches = [offload] if offload is not None else ([False, True] if run.cuda else [False])
    best: tuple[float, Choice] | None = None
    smallest: Choice | None = None
    for budget in budgets:
        for moved in switches:
            setting = replace(run, row_tokens=max(budget, longest), offload=moved)
            none, one = (sum(forecast(shape, replace(setting, kept_layers=k)).values()) for k in (0, 1))
            fit = math.floor((limit - none) / max(one - none, 1.0)) if limit >= none else -1
            layers = min(shape.layers, max(fit, 0)) if kept is None else kept
            peak = sum(forecast(shape, replace(setting, kept_layers=layers)).values())
            found = Choice(budget, layers, moved, peak)
            if smallest is None or peak < smallest.peak:
                smallest = found
            # Passes of a token: forward, backward, and the recompute of layers that are not kept.
            cost = (3 - layers / shape.layers) * (1 + PASS_TOKENS / max(budget, 1)) * (1.01 if moved else 1.0)
            if peak <= limit and (best is None or cost < best[0]):
                best = (cost, found)
    assert smallest is not None
    return best[1] if best is not None else smallest
