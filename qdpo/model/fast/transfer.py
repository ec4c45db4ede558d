"""Small tensors from the host to the device, without holding the host up."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`.

    A plain copy to a GPU comes from pageable memory, and waits for everything that the GPU was given before it.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
