"""4-bit layers: how they are asked for, kept differentiable, and fingerprinted. The room that knows bitsandbytes."""

import hashlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import BitsAndBytesConfig


def four_bit_config(quantization: str, double_quant: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' request for NF4 or FP4 linear layers; embeddings and head stay as they are."""
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
    """Fixes the compute type of every 4-bit layer and keeps it differentiable; returns their number.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in place at its first forward pass in eval mode
    without gradients (a reference pass, an evaluation). Later training passes then return no gradient, and
    dequantisation reads garbage, both without an error. The layer's own switch turns the repacking off.
    """
    count = 0
    for _name, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        count += 1
    return count


def frozen_product(layer: nn.Linear, x_TK: Tensor) -> Tensor:
    """x Wᵀ + bias, shape (T, N), of a frozen linear layer in 4 or 16 and 32 bit, without a graph."""
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
    """A 4-bit layer of the same shape with random weights, quantised on `device`; `layer` may lie on meta.

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
            dense, blocksize=64, compress_statistics=double_quant, quant_type=quantization
        )
        weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=double_quant,
            quant_type=quantization, bnb_quantized=True, module=four_bit,
        )  # fmt: skip
        four_bit.quant_state = state
    four_bit.weight = weight
    return four_bit


def _empty_state(shape: tuple[int, int], quantization: str, double_quant: bool, dtype: torch.dtype) -> Any:
    blocks = -(-shape[0] * shape[1] // 64)
    nested = None
    if double_quant:
        nested = bnb.functional.QuantState(
            absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
        )
    return bnb.functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32), shape=torch.Size(shape),
        code=torch.empty(16), blocksize=64, quant_type=quantization, dtype=dtype,
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

    One edited byte, another quantisation type or block size, another dtype: another checksum.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(model), key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def round_trip_error(device: torch.device) -> float:
    """Relative error, root mean square, of a normal matrix through NF4 and back on `device`; 0.09 for a sound build."""
    dense = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    error = bnb.functional.dequantize_4bit(packed, state) - dense
    return float(error.norm() / dense.norm())
