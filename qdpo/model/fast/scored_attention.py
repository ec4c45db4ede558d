"""Causal attention with soft-capped scores or sinks, in blocks of queries: scores exist for one block at a time.

The backward pass recomputes a block's scores from the kept log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1),
so that memory grows linearly with tokens, not quadratically.

Letters: B = 1 row · H heads · Q queries · G keys · D head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Scores per block: 64 MB in float32.
BLOCK = 2**24


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None,
        sink_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        output = torch.empty(*query.shape[:3], value.shape[3], dtype=value.dtype, device=query.device)
        lse_BHQ = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.scale, ctx.window, ctx.cap = scale, window, cap
        for rows, keys in blocks(query, key, window):
            score, _tanh = _scores(ctx, query, key, rows, keys)
            lse = score.logsumexp(-1)
            if sink_H is not None:
                lse = torch.logaddexp(lse, sink_H.float()[:, None])
            lse_BHQ[:, :, rows] = lse
            output[:, :, rows] = score.sub_(lse[..., None]).exp_().to(value.dtype) @ value[:, :, keys]
        ctx.save_for_backward(query, key, value, output, lse_BHQ)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, output, lse_BHQ = ctx.saved_tensors
        (grad_output,) = gradients
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        for rows, keys in blocks(query, key, ctx.window):
            score, tanh = _scores(ctx, query, key, rows, keys)
            prob = score.sub_(lse_BHQ[:, :, rows, None]).exp_()
            grad = grad_output[:, :, rows]
            grad_value[:, :, keys] += prob.to(value.dtype).mT @ grad
            delta = torch.linalg.vecdot(grad.float(), output[:, :, rows].float())
            slope = (grad @ value[:, :, keys].mT).float().sub_(delta[..., None]).mul_(prob)
            if tanh is not None:
                slope *= tanh.square_().neg_().add_(1)
            narrow = slope.mul_(ctx.scale).to(query.dtype)
            grad_query[:, :, rows] = narrow @ key[:, :, keys]
            grad_key[:, :, keys] += narrow.mT @ query[:, :, rows]
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """Output (B, H, Q, D) for query (B, H, Q, D), key and value (B, H, G, D): the last query sees the last key.

    Scores are cap · tanh(scale · q·k / cap); a sink is an extra key without a value; `window` counts the query's key.
    Raises: NotImplementedError if the sinks are trained.
    """
    if sink_H is not None and sink_H.requires_grad:
        raise NotImplementedError("trained attention sinks are not supported")
    output: Tensor = _Scored.apply(query, key, value, scale, window, softcap, sink_H)  # type: ignore[no-untyped-call]
    return output


def blocks(query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys visible to any of its queries."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    size = max(1, BLOCK // (heads * keys))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        first = 0 if window is None else max(0, keys - queries + start - window + 1)
        yield slice(start, stop), slice(first, keys - queries + stop)


def _scores(ctx: Any, query: Tensor, key: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
    """A block's scores in float32, -inf where hidden, and the tanh of the capped scores."""
    score = (query[:, :, rows] @ key[:, :, keys].mT).float().mul_(ctx.scale)
    tanh = None
    if ctx.cap is not None:
        tanh = torch.tanh(score.div_(ctx.cap))
        score = tanh * ctx.cap
    place = torch.arange(rows.start, rows.stop, device=query.device)[:, None] + key.shape[2] - query.shape[2]
    other = torch.arange(keys.start, keys.stop, device=query.device)[None, :]
    hidden = other > place
    if ctx.window is not None:
        hidden |= other <= place - ctx.window
    return score.masked_fill_(hidden, float("-inf")), tanh
