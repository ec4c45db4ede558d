"""Slices of rows, so that float32 work on a long matrix needs little memory."""

from collections.abc import Iterator

from torch import Tensor

# Numbers per slice: 16 MB in float32.
SLICE = 2**22


def slices(x: Tensor) -> Iterator[slice]:
    """The rows of a tensor, in slices of about SLICE numbers."""
    rows = max(1, SLICE // max(1, x[0].numel())) if len(x) else 1
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)
