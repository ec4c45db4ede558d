"""Estimated time of a step on a named card, from published peak rates; no torch.

An estimate, not a measurement: matrix products at a share of the card's dense rate, dequantisation and elementwise work
at its memory bandwidth, and the host's time to launch everything.
"""

from dataclasses import dataclass

from qdpo.families.shapes import AnyShape
from qdpo.forecast import memory
from qdpo.forecast.memory import MemorySettings, RowSize


@dataclass(frozen=True)
class Card:
    """A graphics card: memory in GiB, dense 16-bit products with float32 sums in TFLOP/s, bandwidth in GB/s."""

    gib: float
    tflops: float
    bandwidth: float


# NVIDIA's architecture white papers (GA102, Ada, Blackwell) and data sheets; dense rates, without sparsity.
CARDS = {
    "rtx-3060-12gb": Card(12, 25.6, 360),
    "rtx-3070": Card(8, 40.6, 448),
    "rtx-3080": Card(10, 59.5, 760),
    "rtx-3090": Card(24, 71, 936),
    "rtx-4060": Card(8, 30, 272),
    "rtx-4060-ti-16gb": Card(16, 44, 288),
    "rtx-4070": Card(12, 58, 504),
    "rtx-4080": Card(16, 97.5, 717),
    "rtx-4090": Card(24, 165, 1008),
    "rtx-5090": Card(32, 210, 1792),
    "a100-40gb": Card(40, 312, 1555),
    "h100": Card(80, 989, 3350),
    "h200": Card(141, 989, 4800),
}
# Share of the dense rate that large products reach; H200: 790 of 989 measured (research on matrix rates).
EFFICIENCY = 0.7
# A recompute stops before each layer's last base product.
RECOMPUTED = 0.78
# Numbers read and written per token and layer by work other than products, in hidden widths (0.4 MB in a 7B model).
ELEMENTWISE = 50
# Seconds of host work to launch a layer's forward and backward pass, kept or recomputed.
LAUNCH_KEPT, LAUNCH_RECOMPUTED = 0.0039, 0.0076
# The host's copy of looked-up rows, and the cost of waiting for offloaded inputs: guesses.
HOST_EMBEDDINGS, OFFLOAD = 1.01, 1.01


def card_for(gib: float) -> str:
    """A common card with at most this memory; the smallest card if none is that small."""
    common = ("rtx-4060", "rtx-3060-12gb", "rtx-4060-ti-16gb", "rtx-3090", "rtx-5090", "a100-40gb", "h100")
    fitting = [name for name in common if CARDS[name].gib <= gib + 0.5]
    return fitting[-1] if fitting else common[0]


def row_seconds(shape: AnyShape, run: MemorySettings, row: RowSize, card: Card, *, scoring: bool = False) -> float:
    """Seconds for a row's forward and backward pass; `scoring`: for a forward pass alone, as of the reference."""
    kept = min(run.kept_layers, shape.layers) / shape.layers
    passes = 1.0 if scoring else 2.0 + RECOMPUTED * (1 - kept)
    head = (1 if scoring else 2) * 2.0 * shape.table_weights * row.responses
    tokens, sequences = memory.computed_tokens(shape, row), memory.computed_sequences(shape, row)
    products = (2.0 * shape.product_weights * tokens * passes + head) / (card.tflops * 1e12 * EFFICIENCY)
    moved = 1.0 * ELEMENTWISE * shape.hidden * run.element * tokens * shape.layers
    if run.quantised:
        # Experts are made dense in memory: half a byte read, 2 written, and read again by the product.
        moved += 2.5 * shape.linear_weights * sequences + 4.5 * shape.met_weights(tokens / sequences) * sequences
    device = products + moved * passes / (card.bandwidth * 1e9)
    launch = sequences * shape.layers * (LAUNCH_KEPT * kept + LAUNCH_RECOMPUTED * (1 - kept)) / (3 if scoring else 1)
    slower = (OFFLOAD if run.offload and kept < 1 else 1.0) * (HOST_EMBEDDINGS if run.host_embeddings else 1.0)
    return max(device, launch) * slower
