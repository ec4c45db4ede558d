"""A row of pairs as model input."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qdpo.model.fast.attention import SpanLike


@dataclass(frozen=True)
class RowTensors:
    """One row on the device: the input of `row_scores`."""

    token_T: Tensor
    position_T: Tensor
    source_N: Tensor
    label_N: Tensor
    spans: Sequence[SpanLike]
