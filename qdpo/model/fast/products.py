"""Matrix products whose result is wanted in float32."""

import torch
from torch import Tensor


def mm_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32; on CUDA the sum is never rounded to 16 bits on its way."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
