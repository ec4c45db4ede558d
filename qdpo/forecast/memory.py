"""Peak memory of a training step by cause, from plain numbers; no torch.

The forecast is the largest of the moments in a step at which memory can peak, counted tensor by tensor as the code
keeps them. `measure.trace` runs the actual step on fake tensors and checks these formulas against it.

Letters: T tokens of a row · N of them in answers · G keys (prompts count twice) · H hidden width · I intermediate width
· Q, K widths of all query and key heads · R adapter rank · V vocabulary · e bytes of the compute type.
"""

from qdpo.families.shapes import AnyShape, Shape
from qdpo.families.traced import TracedShape
from qdpo.forecast import composed
from qdpo.forecast.sizes import GIB as GIB
from qdpo.forecast.sizes import STATE_BYTES as STATE_BYTES
from qdpo.forecast.sizes import MemorySettings as MemorySettings
from qdpo.forecast.sizes import RowSize as RowSize
from qdpo.forecast.sizes import nf4_bytes, trained_bytes

# Numbers that a norm or an MLP works on at a time, in float32, and scores of a block: those of model/fast.
SLICE = 2**22
SCORES = 2**24
# Not a tensor: the CUDA context with its loaded kernels, and the libraries' workspaces. Not measured yet.
CONTEXT = 0.5 * GIB
WORKSPACES = 0.1 * GIB
# On the CPU: the libraries, as resident after loading torch, transformers and bitsandbytes (measured: 0.9 to 1.0).
PROCESS = 1.0 * GIB


def fixed(shape: AnyShape, run: MemorySettings) -> dict[str, float]:
    """Bytes on the device before a step, by cause."""
    if isinstance(shape, TracedShape):
        return composed.fixed(shape, run)
    e = run.element
    sizes = [inputs * outputs for inputs, outputs in shape.linears]
    stored = [nf4_bytes(size, run.double_quant) if run.quantised else float(e * size) for size in sizes]
    tables = e * table_numbers(shape)
    if run.host_embeddings and not shape.tied:
        tables -= shape.table_weights * e
    return {
        "4-bit base" if run.quantised else "base": shape.layers * sum(stored),
        "embeddings and head": float(tables),
        **trained_bytes(adapter_numbers(shape, run.rank), run),
    }


def table_numbers(shape: AnyShape) -> int:
    """Numbers of all embedding tables and the head; a table that is shared counts once."""
    return shape.tables if isinstance(shape, TracedShape) else shape.table_weights * (1 if shape.tied else 2)


def adapter_numbers(shape: AnyShape, rank: int) -> int:
    """Trained numbers of an adapter on every linear layer except the head."""
    if isinstance(shape, TracedShape):
        return rank * sum(one.adapted for one in shape.weights)
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.linears)


def kept_bytes(shape: Shape, run: MemorySettings, row: RowSize) -> float:
    """Bytes that one layer keeps for its backward pass, its input included."""
    e, tokens, layer = run.element, row.tokens, shape.layer
    hidden = 4 + (layer.norms - 2)  # input, first norm, middle, second norm; the outputs that later norms keep
    wide = 2 * shape.intermediate
    heads = (3 if layer.copied_output else 2) * shape.query + ((shape.query + shape.key) if layer.head_norms else 0)
    low = run.rank * len(shape.linears)
    statistics = 4 * (shape.heads + layer.norms) + (4 * (shape.heads + shape.key_heads) if layer.head_norms else 0)
    gathered = 2 * e * row.keys * (shape.query if layer.scored else shape.key)
    return e * tokens * (hidden * shape.hidden + heads + wide + low) + gathered + tokens * statistics


def forecast(shape: AnyShape, run: MemorySettings, row: RowSize) -> dict[str, float]:
    """Bytes on the device at the step's peak, by cause."""
    if isinstance(shape, TracedShape):
        return {**composed.fixed(shape, run), **composed.at_peak(shape, run, row), **outside(run)}
    moments = [_at_head(shape, run, row), _in_last_mlp(shape, run, row)]
    kept = min(run.kept_layers, shape.layers)
    if kept > 0:
        moments.append(_in_backward(shape, run, row, kept * kept_bytes(shape, run, row), kept))
    if kept < shape.layers:
        moments.append(_in_backward(shape, run, row, 0.0, kept))
    highest = max(moments, key=lambda moment: sum(moment.values()))
    return {**fixed(shape, run), **highest, **outside(run)}


def outside(run: MemorySettings) -> dict[str, float]:
    """Bytes outside all tensors, by cause."""
    if not run.cuda:
        return {"libraries": PROCESS if run.context else 0.0}
    return {"CUDA context": CONTEXT if run.context else 0.0, "workspaces": WORKSPACES}


def peak(shape: AnyShape, run: MemorySettings, row: RowSize) -> float:
    """The total of `forecast`, in bytes."""
    return sum(forecast(shape, run, row).values())


def _inputs(shape: Shape, run: MemorySettings, row: RowSize, kept: int) -> float:
    """Inputs of recomputed layers: all on the device, or with offload the current input and the one in transfer."""
    recomputed = shape.layers - kept
    return run.element * row.tokens * shape.hidden * (min(recomputed, 2) if run.offload else recomputed)


def _weight(run: MemorySettings, size: int) -> float:
    """A matrix in the compute type, with its unpacked scales."""
    return size * (run.element + (1 / 16 if run.double_quant else 0.0)) if run.quantised else 0.0


def _indices(row: RowSize) -> float:
    """Ids, positions, labels, gathered keys and per-token metrics."""
    return 8.0 * (2 * row.tokens + row.keys) + 80.0 * row.responses


def _at_head(shape: Shape, run: MemorySettings, row: RowSize) -> dict[str, float]:
    """After all layers: the last hidden states, those of answer tokens with their slopes, and one tile of logits."""
    e, kept = run.element, min(run.kept_layers, shape.layers)
    rows = min(row.responses, max(16, run.tile_mib * 2**20 // (shape.vocabulary * 12)))
    tile = rows * shape.vocabulary * 12.0
    return {
        "kept layers": kept * kept_bytes(shape, run, row),
        "inputs of recomputed layers": _inputs(shape, run, row, kept),
        "working layer": e * row.tokens * 2 * shape.hidden + _indices(row),
        "head tile": tile + 2 * e * row.responses * shape.hidden,
    }


def _in_last_mlp(shape: Shape, run: MemorySettings, row: RowSize) -> dict[str, float]:
    """The forward pass in the last layer's MLP: the input of its down projection, or one gate and up matrix."""
    e, kept, size = run.element, min(run.kept_layers, shape.layers), shape.intermediate * shape.hidden
    working, weight = shape.hidden + shape.intermediate, _weight(run, size)
    if shape.layer.fused_mlp and _weight(run, size) > e * row.tokens * working:
        working, weight = 0, _weight(run, 2 * size)
    if kept == 0:
        working += 2 * shape.hidden + 2 * shape.intermediate
    return {
        "kept layers": kept * kept_bytes(shape, run, row),
        "inputs of recomputed layers": _inputs(shape, run, row, kept),
        "working layer": e * row.tokens * working + _indices(row),
        "dequantised weight": weight,
    }


def _in_backward(shape: Shape, run: MemorySettings, row: RowSize, kept: float, first: int) -> dict[str, float]:
    """The backward pass in a layer, `kept` bytes of kept layers before it; 0: the first recomputed one."""
    own = 0.0 if kept else kept_bytes(shape, run, row) - run.element * row.tokens * shape.hidden
    working, weight = max(_mlp_gradients(shape, run, row), _attention_gradients(shape, run, row), key=sum)
    return {
        "kept layers": kept,
        "inputs of recomputed layers": _inputs(shape, run, row, first),
        "working layer": own + working + _indices(row),
        "dequantised weight": weight,
    }


def _mlp_gradients(shape: Shape, run: MemorySettings, row: RowSize) -> tuple[float, float]:
    """The gradient of the MLP's product, then a dequantised weight or a slice's float32 work."""
    e, tokens, wide = run.element, row.tokens, shape.intermediate
    down = _weight(run, wide * shape.hidden)
    slices = 12.0 * min(SLICE, tokens * wide)
    choices = [(e * tokens * (shape.hidden + wide) + max(0.0, slices - down), down)]
    if shape.layer.fused_mlp:
        choices.append((e * tokens * shape.hidden, 2 * down))
    return max(choices, key=sum)


def _attention_gradients(shape: Shape, run: MemorySettings, row: RowSize) -> tuple[float, float]:
    """Gradients of queries, keys and values, and the kernel's accumulators; the MLP's part is freed by then."""
    e, tokens = run.element, row.tokens
    gone = e * tokens * (2 * shape.intermediate + 2 * shape.hidden + shape.layer.copied_output * shape.query)
    working = 2.0 * e * (tokens * (shape.hidden + shape.query) + row.keys * shape.key) - gone
    if shape.layer.scored:
        working += (12.0 + e) * min(SCORES, shape.heads * row.sequence**2) + (8 + 2 * e) * row.sequence * shape.query
        return working + 2 * e * row.keys * shape.query, 0.0
    working += 4.0 * tokens * shape.query
    if shape.query != shape.key:
        working += 2 * e * row.keys * shape.query
    return working, 0.0


def computed_tokens(shape: AnyShape, row: RowSize) -> int:
    """Tokens that pass through the layers: a prompt once, or once for each answer where rows cannot share it."""
    return row.keys if isinstance(shape, TracedShape) and not shape.shared else row.tokens


def computed_sequences(shape: AnyShape, row: RowSize) -> int:
    """Passes through the layers for one row: one, or one for each answer where rows cannot share a prompt."""
    return 2 * max(row.pairs, 1) if isinstance(shape, TracedShape) and not shape.shared else 1


def host_bytes(shape: AnyShape, run: MemorySettings, row: RowSize) -> dict[str, float]:
    """Host memory by cause, of a run on a card; the process itself is an estimate, not measured yet."""
    waiting = shape.layers - min(run.kept_layers, shape.layers) if run.offload else 0
    copies = shape.copies if isinstance(shape, TracedShape) else 1
    buffer = run.element * computed_tokens(shape, row) * shape.hidden * copies
    return {
        "process and libraries": 3.0 * GIB,
        # Pinned blocks are rounded up to a power of two.
        "inputs of recomputed layers": float(waiting * 2 ** max(0, (buffer - 1).bit_length())),
        "embedding table": float(shape.table_weights * run.element if run.host_embeddings else 0),
    }
