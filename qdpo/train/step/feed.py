"""Prefetches rows: a thread prepares those of the next step while the device works on the current step."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdpo.data.tokens.pack import PairRow, pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.policy.row import RowTensors

# Reference log-probs of a pair's chosen and rejected tokens, float32.
Reference = Callable[[TokenPair], tuple[np.ndarray, np.ndarray]]


def row_tensors(row: PairRow, device: torch.device) -> RowTensors:
    """The row's arrays as int64 tensors on the device."""
    return _moved(_on_host(row), device)


@dataclass(frozen=True)
class ReadyRow:
    """A row with everything a step needs, still on the host; pinned if the device is a GPU."""

    row: PairRow
    tensors: RowTensors
    reference_N: Tensor | None

    def on(self, device: torch.device) -> tuple[RowTensors, Tensor | None]:
        """Copies row and reference to the device; from pinned memory the copies do not block the host."""
        reference = None if self.reference_N is None else self.reference_N.to(device, non_blocking=True)
        return _moved(self.tensors, device), reference


def ready(row: PairRow, reference: Reference | None, *, pin: bool = False) -> ReadyRow:
    """Builds the row's tensors and looks up its reference. `reference` is None for losses that need no reference."""
    tensors, reference_N = _on_host(row), None
    if reference is not None:
        reference_N = torch.from_numpy(np.concatenate([part for pair in row.pairs for part in reference(pair)]))
    if pin:
        tensors = _each(tensors, lambda part: part.pin_memory())
        reference_N = None if reference_N is None else reference_N.pin_memory()
    return ReadyRow(row, tensors, reference_N)


class Feed:
    """Returns the rows of one step after another, preparing those of the next step meanwhile."""

    def __init__(
        self,
        pairs_of: Callable[[int], Sequence[TokenPair]],
        reference: Reference | None,
        *,
        tokens_per_row: int,
        device: torch.device,
    ):
        self._make: Callable[[int], list[ReadyRow]] = lambda step: [
            ready(row, reference, pin=device.type == "cuda") for row in pack_rows(pairs_of(step), tokens_per_row)
        ]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qdpo-feed")
        self._next: tuple[int, Future[list[ReadyRow]]] | None = None

    def rows(self, step: int, *, last: int) -> list[ReadyRow]:
        """Rows of `step`; starts to prepare those of the next step, up to step `last`."""
        if self._next is not None and self._next[0] == step:
            rows = self._next[1].result()
        else:
            rows = self._make(step)
        self._next = (step + 1, self._worker.submit(self._make, step + 1)) if step < last else None
        return rows

    def close(self) -> None:
        """Waits for rows in preparation and discards them."""
        self._worker.shutdown(wait=True, cancel_futures=True)


def _on_host(row: PairRow) -> RowTensors:
    place = [torch.from_numpy(a.astype(np.int64)) for a in (row.token_T, row.position_T, row.source_N, row.label_N)]
    return RowTensors(place[0], place[1], place[2], place[3], row.spans)


def _moved(tensors: RowTensors, device: torch.device) -> RowTensors:
    return _each(tensors, lambda part: part.to(device, non_blocking=True))


def _each(tensors: RowTensors, change: Callable[[Tensor], Tensor]) -> RowTensors:
    names = ("token_T", "position_T", "source_N", "label_N")
    moved: dict[str, Any] = {name: change(getattr(tensors, name)) for name in names}
    return replace(tensors, **moved)
