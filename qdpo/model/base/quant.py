"""4-bit layers: requests, keeps differentiable, fingerprints and reproduces them. The importer of bitsandbytes."""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import BitsAndBytesConfig

from qdpo.run.record import FourBitMark

# Weights per scale: the default of bitsandbytes, and so of transformers.
BLOCK = 64
# Weights quantised at a time on the CPU: the five temporary copies of bitsandbytes then stay in the core's cache.
TILE = 2**17


def four_bit_config(quantization: str, double_quant: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The transformers config for NF4 or FP4 linear layers; embeddings and head stay unquantised."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, bnb.nn.Linear4bit]]:
    """Name and module of every 4-bit linear layer."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield name, module


def settle(model: nn.Module, dtype: torch.dtype) -> int:
    """Sets the compute type of every 4-bit layer and keeps it differentiable; returns the number of layers.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward pass in eval mode
    without gradients (a reference pass, an evaluation). Later training passes then return no gradient, and
    dequantisation reads garbage, both silently. A switch on the layer turns the repacking off.
    """
    count = 0
    for _name, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        count += 1
    return count


def frozen_product(layer: nn.Linear, x_TK: Tensor) -> Tensor:
    """x Wᵀ + bias, shape (T, N), of a frozen linear layer in 4, 16 or 32 bits, without a graph."""
    if isinstance(layer, bnb.nn.Linear4bit):
        with torch.no_grad():
            product: Tensor = bnb.matmul_4bit(x_TK, layer.weight, bias=layer.bias, quant_state=layer.weight.quant_state)
        return product
    return nn.functional.linear(x_TK, layer.weight, layer.bias)


def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's weight (N, K) in `dtype`; dequantised for this call if it is stored in 4 bits."""
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.to(dtype)
    return layer.weight.to(dtype)


def random_four_bit(
    layer: nn.Linear, quantization: str, double_quant: bool, dtype: torch.dtype, device: torch.device
) -> bnb.nn.Linear4bit:
    """A 4-bit layer of the same shape with random weights, quantised on `device`; `layer` may be on meta.

    Under FakeTensorMode, which cannot make bitsandbytes' parameter class, the weight is a plain parameter with the
    same attributes.
    """
    shape = (layer.out_features, layer.in_features)
    with unset_fake_temporarily():
        four_bit = bnb.nn.Linear4bit(1, 1, layer.bias is not None, dtype, double_quant, quantization, device="meta")
    four_bit.in_features, four_bit.out_features = layer.in_features, layer.out_features
    if layer.bias is not None:
        four_bit.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device), requires_grad=False)
    if isinstance(torch.empty(0), FakeTensor):
        weight: Any = nn.Parameter(torch.empty((shape[0] * shape[1] + 1) // 2, 1, dtype=torch.uint8), False)
        weight.quant_state = _empty_state(shape, quantization, double_quant, dtype)
        weight.quant_type, weight.compress_statistics = quantization, double_quant
    else:
        dense = torch.randn(shape, dtype=dtype, device=device).mul_(shape[1] ** -0.5)
        packed, state = bnb.functional.quantize_4bit(
            dense, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quantization
        )
        weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=double_quant,
            quant_type=quantization, bnb_quantized=True, module=four_bit,
        )  # fmt: skip
        four_bit.quant_state = state
    four_bit.weight = weight
    return four_bit


def _empty_state(shape: tuple[int, int], quantization: str, double_quant: bool, dtype: torch.dtype) -> Any:
    blocks = -(-shape[0] * shape[1] // BLOCK)
    nested = None
    if double_quant:
        nested = bnb.functional.QuantState(
            absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
    return bnb.functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32), shape=torch.Size(shape),
        code=torch.empty(16), blocksize=BLOCK, quant_type=quantization, dtype=dtype,
        offset=torch.empty(()) if double_quant else None, state2=nested,
    )  # fmt: skip


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model's output depends on, by name: parameters, buffers, and 4-bit scales and tables."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
    for name, buffer in model.named_buffers():
        yield name, buffer
    for name, layer in four_bit_layers(model):
        for key, value in layer.weight.quant_state.as_dict(packed=True).items():
            yield f"{name}.weight.{key}", value


def weights_checksum(model: nn.Module) -> str:
    """sha256 (hex) over every stored tensor's name, type, shape and bytes, as loaded.

    One changed byte, a different quantisation type, block size or dtype gives a different checksum. An adapter around
    the base's layers gives none: its tensors are left out, and the base's have the names that they had.
    """
    total = hashlib.sha256()
    bare = ((name.replace(".base_layer", ""), one) for name, one in stored_tensors(model) if ".lora_" not in name)
    for name, tensor in sorted(bare, key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()


def layer_marks(model: nn.Module) -> dict[str, FourBitMark]:
    """The mark of every 4-bit layer, which proves that its weight was reproduced exactly: see `mark`."""
    return {name: mark(layer.weight.data, layer.weight.quant_state) for name, layer in four_bit_layers(model)}


def mark(packed: Tensor, state: Any) -> FourBitMark:
    """sha256 over the packed bytes and the scales, and the mean that double quantisation subtracts from the scales.

    That mean is a sum whose rounding depends on the number of threads (torch 2.13), and the scales depend on it:
    another machine can reproduce the bytes only if the mean is stored.
    """
    total = hashlib.sha256(raw_bytes(packed))
    for scales in [state.absmax] + ([state.state2.absmax] if state.nested else []):
        total.update(raw_bytes(scales))
    return FourBitMark(sha256=total.hexdigest(), offset=state.offset.item() if state.nested else None)


@dataclass(frozen=True)
class FourBit:
    """The form of 4-bit weights: nf4 or fp4, with or without quantised scales, and the type they were made from."""

    kind: str
    double_quant: bool
    dtype: torch.dtype


def round_trip(
    weight_NK: Tensor, form: FourBit, device: torch.device, offset: float | None = None
) -> tuple[Tensor, FourBitMark]:
    """The weight that a 4-bit layer multiplies by, and its mark; computed on `device`, returned on the CPU.

    `offset` is that of the mark to match; None for a new mark.
    """
    dense = weight_NK.to(device, form.dtype).contiguous()
    packed, absmax = packed_of(dense, form.kind)
    nested, mean = None, None
    if form.double_quant:
        mean = absmax.mean() if offset is None else absmax.new_tensor(offset)
        absmax, nested = bnb.functional.quantize_blockwise(absmax - mean, blocksize=256)
    state = bnb.functional.QuantState(
        absmax=absmax, shape=dense.shape, dtype=form.dtype, blocksize=BLOCK, quant_type=form.kind, offset=mean,
        state2=nested, code=bnb.functional.get_4bit_type(form.kind, device=device),
    )  # fmt: skip
    return bnb.functional.dequantize_4bit(packed, state).cpu(), mark(packed, state)


def packed_of(dense: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Packed 4-bit values and one scale per block, identical to bitsandbytes' for the whole tensor.

    Blocks are independent, so on the CPU tiles of whole blocks are spread over the cores. Splitting each operation over
    the cores instead costs more than it gains.
    """

    def quantise(part: Tensor) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, kind, torch.uint8)
        return made

    if dense.device.type != "cpu":
        return quantise(dense)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = list(pool.map(quantise, torch.split(dense.reshape(-1), TILE)))
    torch.set_num_threads(threads)  # MKL has one setting for all threads
    return torch.cat([packed for packed, _ in parts]), torch.cat([absmax for _, absmax in parts])


STATE = "quant_state.bitsandbytes__"


def stored_weight(packed: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, FourBitMark]:
    """The weight of a 4-bit layer from the tensors that a folder stores for it, and its mark.

    `parts` are the tensors stored with it, by the ends of their names: absmax, quant_map, …
    """
    state = bnb.functional.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    return bnb.functional.dequantize_4bit(packed, state), mark(packed, state)


def four_bit_names(model: nn.Module, form: FourBit) -> set[str]:
    """Names of the layers of a model (which may be on meta) that transformers would load in 4 bits."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    left = get_keys_to_not_convert(model)
    model = replace_with_bnb_linear(model, left, four_bit_config(form.kind, form.double_quant, form.dtype))
    return {name for name, _layer in four_bit_layers(model)}


def in_eight_bits(scales: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Scales in 8 bits (uint8), and a float32 scale for each block of them."""
    packed, state = bnb.functional.quantize_blockwise(scales, blocksize=block)
    return packed, state.absmax


def scale_code(device: torch.device) -> Tensor:
    """The 256 values of the codes of `in_eight_bits`."""
    with unset_fake_temporarily():
        code: Tensor = bnb.functional.create_dynamic_map().to(device)
    return code


def raw_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes in memory, flat, for a digest."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def round_trip_error(device: torch.device) -> float:
    """Relative rms error of a normal matrix after a round trip through NF4 on `device`; 0.09 for a sound build."""
    dense = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bnb.functional.quantize_4bit(dense, blocksize=BLOCK, quant_type="nf4")
    error = bnb.functional.dequantize_4bit(packed, state) - dense
    return float(error.norm() / dense.norm())
