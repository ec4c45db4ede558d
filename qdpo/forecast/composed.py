"""Peak memory of a training step of a model whose layers were traced, put together layer by layer; no torch.

The layers that are recomputed come first. Bytes that a layer leaves add up until the head; each layer's most, forward
and backward, comes on top of what was there when it began.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from qdpo.families import traced
from qdpo.families.traced import LayerKind, Moments, TracedShape
from qdpo.forecast.sizes import MemorySettings, RowSize, nf4_bytes, trained_bytes


def fixed(shape: TracedShape, run: MemorySettings) -> dict[str, float]:
    """Bytes on the device before a step, by cause."""
    e = run.element
    experts = sum(one.experts for one in shape.weights)
    in_four_bits = sum(stack.experts * nf4_bytes(stack.numbers, run.double_quant) for stack in shape.stacks)
    if not run.quantised:
        experts, in_four_bits = experts + shape.expert_weights, 0.0
    matrices = [size for one in shape.weights for size in one.four_bit]
    dense = e * sum(one.dense - one.experts for one in shape.weights)
    stored = sum(nf4_bytes(size, run.double_quant) if run.quantised else float(e * size) for size in matrices)
    hosted = shape.table_weights if run.host_embeddings and not shape.tied else 0
    return {
        "4-bit base" if run.quantised else "base": stored + dense,
        **({"experts in 4 bits": in_four_bits} if in_four_bits else {}),
        **({f"experts in {8 * e} bits": float(e * experts)} if experts else {}),
        "embeddings and head": float(e * (shape.tables - hosted)),
        **trained_bytes(run.rank * sum(one.adapted for one in shape.weights), run),
    }


@dataclass(frozen=True)
class _Sized:
    """The moments of everything at one row size, or of one sequence."""

    before: Moments
    kept: tuple[Moments, ...]
    recomputed: tuple[Moments, ...]
    after: Moments
    after_recomputed: Moments


@lru_cache(maxsize=4096)
def _sized(shape: "_ById", tokens: float, prompts: float, pairs: float, rank: int, element: int) -> _Sized:
    model = shape.model
    factor = element / traced.ELEMENT

    def found(traces: traced.Traces) -> Moments:
        return traces.of(tokens, prompts, pairs).times(factor)

    def more(kind: LayerKind) -> float:
        return element * tokens * (rank - traced.RANK) * kind.weights.low

    return _Sized(
        found(model.before),
        tuple(found(kind.kept).plus(more(kind), more(kind), more(kind)) for kind in model.kinds),
        tuple(found(kind.recomputed).plus(0.0, 0.0, more(kind)) for kind in model.kinds),
        found(model.after),
        found(model.after_recomputed),
    )


class _ById:
    """A shape as a key that is found by identity: to hash its traces takes longer than to read them."""

    def __init__(self, model: TracedShape):
        self.model = model

    def __hash__(self) -> int:
        return hash(self.model.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.model is other.model


@dataclass(frozen=True)
class _Instant:
    """Bytes at one of the instants at which memory may peak."""

    kept: float
    inputs: float
    working: float
    head: float = 0.0

    @property
    def together(self) -> float:
        return self.kept + self.inputs + self.working + self.head


def at_peak(shape: TracedShape, run: MemorySettings, row: RowSize) -> dict[str, float]:
    """Bytes of the step's row at its peak, by cause."""
    most = max(_instants(shape, run, row), key=lambda instant: instant.together)
    return {
        "kept layers": most.kept,
        "inputs of recomputed layers": most.inputs,
        "working layer": most.working,
        "head tile": most.head,
    }


def _instants(shape: TracedShape, run: MemorySettings, row: RowSize) -> Iterator[_Instant]:
    e, hidden = run.element, shape.hidden
    sequences, tokens, prompts, pairs = 1, float(row.tokens), row.prompts, row.pairs
    if not shape.shared:  # answer by answer, each with its own prompt: the last one comes on top of what others keep
        sequences = 2 * max(row.pairs, 1)
        tokens, prompts, pairs = row.keys / sequences, 0, 1
    sized = _sized(_ById(shape), tokens, prompts, pairs, run.rank, e)
    layers, kept = shape.layers, min(run.kept_layers, shape.layers)
    parked = e * tokens * hidden * shape.copies if run.offload else 0.0
    # Ids, positions, labels and metrics per token are small and of no layer.
    around = sized.before.stays + 80.0 * row.responses
    left_kept = sum(sized.kept[place].stays for place in shape.order[layers - kept :])
    left_inputs = sum(max(0.0, sized.recomputed[place].stays - parked) for place in shape.order[: layers - kept])
    after = sized.after if kept == layers else sized.after_recomputed
    lives_on = after.stays - sized.after.stays
    others = sequences - 1
    base_kept, base_inputs = others * left_kept, others * left_inputs
    base = around + others * (sized.before.stays + after.stays)
    joined = e * row.keys * hidden if others else 0.0
    yield _Instant(base_kept, base_inputs, base + sized.before.forward - sized.before.stays)
    so_far_kept, so_far_inputs = base_kept, base_inputs
    for number, place in enumerate(shape.order):
        recomputed = number < layers - kept
        one = sized.recomputed[place] if recomputed else sized.kept[place]
        more = (parked if number else 0.0) if recomputed else lives_on
        yield _Instant(so_far_kept, so_far_inputs, base + max(one.forward, one.backward + joined + more))
        so_far_kept += 0.0 if recomputed else one.stays
        so_far_inputs += max(0.0, one.stays - parked) if recomputed else 0.0
    yield _Instant(so_far_kept, so_far_inputs, base + max(after.forward, after.backward + joined))
    rows = min(row.responses, max(16, run.tile_mib * 2**20 // (shape.vocabulary * 12)))
    tile = rows * shape.vocabulary * 12.0 + e * row.responses * hidden * (2 if others else 1)
    yield _Instant(so_far_kept, so_far_inputs, base + after.stays + joined, tile)
