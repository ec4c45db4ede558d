"""The convolution and the scan of a recurrent layer over a row of pairs: each answer continues from its prompt.

Three ways to scan: a loop over the pairs, for plain PyTorch; for kernels, all prompts in one call and all answers in a
second, as sequences of one row (`cu_seqlens`) or as a batch. Plain PyTorch keeps ten or more float32 tensors a token,
so the loop runs in blocks of `BLOCK` tokens: a block keeps its input and its first state, and its backward pass
computes the rest again. What a scan needs beyond its input is then what one block needs.

Letters: C channels of the convolution · K its taps · S sequences · T tokens of the row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qdpo.model.fast.attention import PairSpans
from qdpo.model.fast.transfer import to_device

# Tokens of a block.
BLOCK = 256
# Values of `PairSpans.paths`.
LOOP = "its layers' states continued pair by pair"
BATCH = "its layers' states continued in two batches a layer"
VARLEN = "its layers' states continued in two varlen calls a layer"


@dataclass(frozen=True)
class ScanNames:
    """The names of a scan's arguments for states; they differ between libraries."""

    initial: str
    final: str
    always: bool
    """It returns a pair (output, state) whether a state is asked for or not."""
    varlen: bool
    """Its kernels divide a row by `cu_seqlens`. Mamba's take that name for something else: they mix the sequences."""


def convolution(
    plain: Callable[..., Tensor], spans: PairSpans, x_BCT: Tensor, weight_CK: Tensor, **others: Any
) -> Tensor:
    """The causal convolution (B, C, T) of a row in one call, each rejected answer behind its prompt's last taps.

    Zeros separate the sequences, as many as the convolution itself puts before the first.
    """
    before = weight_CK.shape[-1] - 1
    gap_BCK = x_BCT.new_zeros(*x_BCT.shape[:2], before)
    lengths = []
    for span in spans:
        taps = min(before, span.prompt)
        lengths += [span.prompt - taps, taps, span.chosen, span.rejected]
    parts, pieces = torch.split(x_BCT, lengths, 2), []
    for head, taps_BCK, chosen, rejected in zip(*(parts[place::4] for place in range(4)), strict=True):
        pieces += [gap_BCK, head, taps_BCK, chosen, gap_BCK[..., taps_BCK.shape[-1] :], taps_BCK, rejected]
    found = plain(torch.cat(pieces, 2), weight=weight_CK, **others)
    counts = [count for span in spans for count in (before, span.prompt + span.chosen, before, span.rejected)]
    return torch.cat(torch.split(found, counts, 2)[1::2], 2)


class Scan:
    """A scan with its arguments: `parts` are the tensors (1, T, …) of a row, by name; others serve every token.

    `first` are the names of those that are passed by position.
    """

    def __init__(self, plain: Callable[..., Any], names: ScanNames, given: dict[str, Any], first: tuple[str, ...] = ()):
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 2}
        row = next(iter(tensors.values())).shape[:2]
        self.parts = {name: value for name, value in tensors.items() if value.shape[:2] == row}
        others = {name: value for name, value in given.items() if name not in self.parts}
        self.run = _Run(plain, names, tuple(self.parts), others, first)


@dataclass(frozen=True)
class _Run:
    """A call of a scan for some tokens; it holds no tensor of the row, so that a recomputed layer keeps none."""

    plain: Callable[..., Any]
    names: ScanNames
    order: tuple[str, ...]
    others: dict[str, Any]
    first: tuple[str, ...]

    def __call__(self, parts: Iterable[Tensor], state: Tensor | None, **more: Any) -> tuple[Tensor, Tensor]:
        """Output and final state for the arguments of some tokens, in the order of their names."""
        given = {**self.others, **dict(zip(self.order, parts, strict=True)), **more}
        by_place = [given.pop(name) for name in self.first]
        result = self.plain(*by_place, **given, **{self.names.initial: state, self.names.final: True})
        output: Tensor = result[0]
        final: Tensor = result[1]
        return output, final


def loop(scan: Scan, spans: PairSpans) -> Tensor:
    """One sequence after another, in blocks of tokens."""
    lengths = [length for span in spans for length in (span.prompt, span.chosen, span.rejected)]
    columns = [torch.split(part, lengths, 1) for part in scan.parts.values()]
    outputs, state = [], None
    for place, parts in enumerate(zip(*columns, strict=True)):
        if place % 3 == 0:
            output, state = _in_blocks(scan.run, parts, None)
        else:
            output, _ = _in_blocks(scan.run, parts, state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def _in_blocks(run: _Run, parts: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for block in zip(*(torch.split(part, BLOCK, 1) for part in parts), strict=True):
        output, state = _Block.apply(run, state, *block)  # type: ignore[no-untyped-call]
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


class _Block(torch.autograd.Function):
    """A scan over some tokens that keeps its input and its first state, and computes all else again when asked."""

    @staticmethod
    def forward(ctx: Any, run: _Run, state: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, *parts)
        return run(parts, state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        held: list[Any] = [None if one is None else one.detach().requires_grad_() for one in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.run(held[1:], held[0])
        asked = [(one, slope) for one, slope in zip(results, gradients, strict=True) if slope is not None]
        wanted = [one for one, needs in zip(held, ctx.needs_input_grad[1:], strict=True) if needs]
        outputs, slopes = zip(*asked, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, slopes, allow_unused=True))
        return None, *(next(found) if needs else None for needs in ctx.needs_input_grad[1:])


def batch(scan: Scan, spans: PairSpans) -> Tensor:
    """All prompts as one batch, then all answers with their prompts' states: for kernels without `cu_seqlens`.

    Prompts get zeros before them, which leave a state of zero as it is, answers behind them.
    """
    rows = list(scan.parts.values())
    prompts = [(span.start, span.prompt) for span in spans]
    ends = [(span.start + span.prompt, span.chosen) for span in spans]
    ends += [(span.start + span.prompt + span.chosen, span.rejected) for span in spans]
    before, state = scan.run([_stacked(row, prompts, first=True) for row in rows], None)
    behind, _ = scan.run([_stacked(row, ends, first=False) for row in rows], state.repeat(2, *[1] * (state.dim() - 1)))
    pieces, number, longest = [], len(spans), before.shape[1]
    for place, span in enumerate(spans):
        pieces.append(before[place, longest - span.prompt :])
        pieces += [behind[place, : span.chosen], behind[number + place, : span.rejected]]
    return torch.cat(pieces)[None]


def _stacked(row: Tensor, places: Sequence[tuple[int, int]], *, first: bool) -> Tensor:
    """Sequences of a row as a batch, with zeros before or behind the shorter ones."""
    longest = max(length for _start, length in places)
    around = [0, 0] * (row.dim() - 2)
    parts = []
    for start, length in places:
        gap = longest - length
        parts.append(pad(row[0, start : start + length], (*around, gap, 0) if first else (*around, 0, gap)))
    return torch.stack(parts)


def varlen(scan: Scan, spans: PairSpans) -> Tensor:
    """All prompts in one call, then all answers with their prompts' states: for kernels that take `cu_seqlens`."""
    device = next(iter(scan.parts.values())).device
    prompt_S = [span.prompt for span in spans]
    answer_S = [length for span in spans for length in (span.chosen, span.rejected)]
    places = list(_thirds(spans))
    prompt_T = to_device(torch.cat(places[0::3]), device)
    answer_T = to_device(
        torch.cat([one for pair in zip(places[1::3], places[2::3], strict=True) for one in pair]), device
    )
    rows = list(scan.parts.values())
    before, state = scan.run(
        [row.index_select(1, prompt_T) for row in rows], None, cu_seqlens=_bounds(prompt_S, device)
    )
    both = state.repeat_interleave(2, 0)
    behind, _ = scan.run([row.index_select(1, answer_T) for row in rows], both, cu_seqlens=_bounds(answer_S, device))
    order_T = torch.argsort(torch.cat([prompt_T, answer_T]))
    return torch.cat([before, behind], 1).index_select(1, order_T)


def _thirds(spans: PairSpans) -> Iterator[Tensor]:
    """The places of each prompt, chosen and rejected answer."""
    for span in spans:
        start = span.start
        for length in (span.prompt, span.chosen, span.rejected):
            yield torch.arange(start, start + length)
            start += length


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int64), device)


WAYS: dict[str, Callable[[Scan, PairSpans], Tensor]] = {LOOP: loop, BATCH: batch, VARLEN: varlen}
