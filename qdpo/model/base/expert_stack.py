"""The weights of a layer's experts in 4 bits: one stack of matrices, quantised and made dense again expert by expert.

bitsandbytes quantises linear layers, and transformers holds experts as one parameter of three dimensions. Each expert's
matrix is quantised on its own, as bitsandbytes would: blocks of 64 numbers with a scale each; with double quantisation
the scales in 8 bits, in blocks of 256, after their mean was subtracted (QLoRA, section 3).

Letters: E experts · N, K rows and columns of a matrix · B blocks of a matrix · C blocks of its scales.
"""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.base import quant
from qdpo.model.base.quant import FourBit
from qdpo.run.record import FourBitMark

# Scales that share a scale of their own, as in bitsandbytes.
SCALES = 256


class FourBitStack(nn.Module):
    """(E, N, K) numbers in 4 bits. `stack[expert]` is a dense matrix, so transformers' own code can multiply by it."""

    weight: Tensor
    absmax: Tensor
    absmax_EC: Tensor
    mean_E: Tensor
    code: Tensor

    def __init__(self, shape: torch.Size, form: FourBit, device: torch.device):
        """Without numbers yet: see `put`. Raises: ValueError if a matrix is not made of whole blocks."""
        super().__init__()
        experts, size = shape[0], math.prod(shape[1:])
        if size % quant.BLOCK:
            raise ValueError(f"a matrix of {size} numbers is not made of whole blocks of {quant.BLOCK}")
        blocks = size // quant.BLOCK
        self.shape, self.form = shape, form
        self.dtype = form.dtype  # of a matrix by its index
        packed = torch.empty(experts, size // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scale_type = torch.uint8 if form.double_quant else torch.float32
        self.register_buffer("absmax", torch.empty(experts, blocks, dtype=scale_type, device=device))
        if form.double_quant:
            self.register_buffer("absmax_EC", torch.empty(experts, -(-blocks // SCALES), device=device))
            self.register_buffer("mean_E", torch.empty(experts, device=device))
            self.register_buffer("code", quant.scale_code(device))

    def put(self, expert: int, matrix: Tensor) -> None:
        """Quantises the matrix (N, K) of one expert."""
        dense = matrix.to(self.weight.device, self.form.dtype).contiguous()
        packed, absmax = quant.packed_of(dense, self.form.kind)
        self.weight.data[expert] = packed.reshape(-1)
        if self.form.double_quant:
            self.mean_E[expert] = mean = exact_mean(absmax)
            self.absmax[expert], self.absmax_EC[expert] = quant.in_eight_bits(absmax - mean, SCALES)
        else:
            self.absmax[expert] = absmax

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The matrices of the experts from `first` to before `end`: (experts, N, K)."""
        some = slice(first, end)
        scales = self.absmax[some]
        if self.form.double_quant:  # the codes, their scales, and the mean that was subtracted
            spread = self.absmax_EC[some].repeat_interleave(SCALES, dim=1)[:, : scales.shape[1]]
            scales = self.code[scales.int()] * spread + self.mean_E[some, None]
        shape = (end - first, *self.shape[1:])
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.weight.data[some].reshape(-1, 1), scales.reshape(-1), quant.BLOCK, self.form.kind, shape,
            self.form.dtype,
        )  # fmt: skip
        return dense.to(dtype)

    def __getitem__(self, expert: Any) -> Tensor:
        """The dense matrix of one expert, (N, K), in `dtype`."""
        place = int(expert)
        return self.dense(place, place + 1, self.dtype)[0]

    def digest(self, expert: int) -> str:
        """The first 16 bytes of sha256 (hex) over what is stored of one expert's matrix."""
        total = hashlib.sha256()
        nested = (self.absmax_EC[expert], self.mean_E[expert]) if self.form.double_quant else ()
        for one in (self.weight.data[expert], self.absmax[expert], *nested):
            total.update(quant.raw_bytes(one))
        return total.hexdigest()[:32]

    def mark(self) -> FourBitMark:
        """The stack's mark, over the digests of its experts."""
        every = [self.digest(expert) for expert in range(self.shape[0])]
        return FourBitMark(sha256=hashlib.sha256("".join(every).encode()).hexdigest(), offset=None, experts=every)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.form.kind}"


def quantised(matrix: Tensor, form: FourBit) -> FourBitStack:
    """A stack of the matrix (N, K) of one expert, on its device."""
    stack = FourBitStack(torch.Size((1, *matrix.shape)), form, matrix.device)
    stack.put(0, matrix)
    return stack


def exact_mean(scales: Tensor) -> Tensor:
    """The mean of the scales, the same on every device: a sum of whole numbers has no order.

    A sum of floating-point numbers depends on the number of threads, and the bytes of the scales depend on it.
    """
    most = float(scales.max())
    if not (math.isfinite(most) and most > 0):
        return scales.new_tensor(0.0)
    power = 40 - math.frexp(most)[1]
    total = int(torch.ldexp(scales.double(), torch.tensor(power, device=scales.device)).to(torch.int64).sum())
    return scales.new_tensor(math.ldexp(total / scales.numel(), -power))
