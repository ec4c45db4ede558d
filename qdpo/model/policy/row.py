"""A row of pairs as the model takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qdpo.model.fast.attention import SpanLike


@dataclass(frozen=True)
class RowTensors:
    """One row on the device: what `row_scores` takes."""

    token_T: Tensor
    position_T: Tensor
    source_N: Tensor
    label_N: Tensor
    spans: Sequence[SpanLike]
