"""Matrix products with a float32 result."""

import torch
from torch import Tensor


def mm_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32; on CUDA the sum is never rounded to 16 bits in between."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
