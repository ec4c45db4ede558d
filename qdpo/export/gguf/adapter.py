"""Writes the adapter as a GGUF file for llama.cpp's --lora, reads it back and compares it with the PEFT delta.

llama.cpp scales B·A by alpha / rank, with the rank taken from the shapes, so alpha is written as the rank.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qdpo.errors import VerificationError
from qdpo.export.gguf.form import Names, form_of, other_writer, row_order
from qdpo.export.merge.lora import Lora, read_lora
from qdpo.export.servers import command
from qdpo.families.family import GgufForm
from qdpo.model.base.text_model import text_model
from qdpo.model.base.weight_names import folder_names
from qdpo.run import disk

TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
# Largest relative error of a delta that counts as rounding: float32 sums in another order; 11 bits.
TOLERANCE = {"f32": 1e-6, "f16": 2e-3}


def write_gguf_adapter(adapter: Path, base: Path, out: Path, *, quant: str, name: str) -> float:
    """Writes `out`; returns the largest error of a layer's delta, relative to the delta's largest entry.

    Raises: ConfigError for a family or adapter that cannot be written; VerificationError if the file differs.
    """
    config = text_model(base).config
    words = command("python", "convert_lora_to_gguf.py", "--base", base, "--outfile", out, adapter)
    form = form_of(config, other_writer(base, words))
    lora = read_lora(adapter)
    folder_names(base).in_files(lora.layers)
    errors: list[float] = []

    def fill(part: Path) -> None:
        _write(part, lora, form, config, Names(form, config, base), quant, name)
        errors.append(compare(part, lora, form, config, base, TOLERANCE[quant]))

    disk.write_file(out, fill)
    return errors[0]


def _write(part: Path, lora: Lora, form: GgufForm, config: Any, names: Names, quant: str, name: str) -> None:
    with closing(gguf.GGUFWriter(part, form.arch)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
        writer.add_name(name)
        for module, layer in lora.layers.items():
            b = layer.b_NR.numpy()
            order = row_order(form, config, module)
            target = names.of(f"{module}.weight")
            for suffix, matrix in ((".lora_a", layer.a_RK.numpy()), (".lora_b", b if order is None else b[order])):
                data = gguf.quants.quantize(np.ascontiguousarray(matrix), TYPES[quant])
                writer.add_tensor(target + suffix, data, raw_dtype=TYPES[quant])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_deltas(path: Path) -> dict[str, torch.Tensor]:
    """The delta that llama.cpp adds to each weight, by llama.cpp's name: alpha / rank · B·A, rows in its order."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    deltas = {}
    for name, b in stored.items():
        if name.endswith(".lora_b"):
            target = name.removesuffix(".lora_b")
            a = stored[f"{target}.lora_a"]
            deltas[target] = alpha / b.shape[1] * (b.float() @ a.float())
    return deltas


def compare(path: Path, lora: Lora, form: GgufForm, config: Any, base: Path, tolerance: float) -> float:
    """Largest relative error of a delta in the file.

    Raises: VerificationError if an error is above `tolerance`, or a layer is missing or unexpected.
    """
    deltas, names = read_deltas(path), Names(form, config, base)
    worst = 0.0
    for module, layer in lora.layers.items():
        found = deltas.pop(names.of(f"{module}.weight"), None)
        if found is None:
            raise VerificationError(f"{path} lacks the layer {module}. Please report this.")
        order = row_order(form, config, module)
        expected = layer.delta_NK if order is None else layer.delta_NK[torch.from_numpy(order)]
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not error <= tolerance:
            raise VerificationError(
                f"{module} in the GGUF adapter differs from the trained adapter by {error:.1e} of its largest entry "
                f"(allowed: {tolerance:g}). Nothing was written. Use `--quant f32`, or report this."
            )
        worst = max(worst, error)
    if deltas:
        raise VerificationError(f"{path} holds layers that were not trained: {sorted(deltas)[:3]}. Please report this.")
    return worst
