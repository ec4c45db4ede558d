"""Log-probability of response tokens from hidden states, without a tokens × vocabulary matrix.

Letters: N response tokens · D hidden width · V vocabulary · R rows of one tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.families.config_fields import head_scale, head_softcap
from qdpo.model.fast import products


@dataclass(frozen=True)
class Head:
    """The frozen output head: logits = cap(scale · (hidden · weightᵀ + bias)), cap(z) = softcap · tanh(z / softcap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, causal_lm: Any) -> "Head":
        """Head of a transformers causal model, with the scale and soft-cap of its config.

        `probe.check_head` compares the result with the model's own logits, which refuses unknown variants.
        """
        layer, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
        return cls(layer.weight, getattr(layer, "bias", None), head_scale(config), head_softcap(config))


@dataclass(frozen=True)
class TokenScores:
    """Per response token, float32, shape (N,). Only `logp` carries a gradient; the others are None unless requested."""

    logp: Tensor
    mean_logit: Tensor | None
    """Mean logit over the vocabulary."""
    entropy: Tensor | None
    """Entropy of the next-token distribution, in nats."""
    hit: Tensor | None
    """1 if the token is the most likely one, else 0."""
    log_square: Tensor | None
    """log Σ p² over the vocabulary: the mean log-prob that WPO aligns with (arXiv 2406.11827, eq. 2)."""


def response_logps(
    hidden_ND: Tensor, label_N: Tensor, head: Head, *, tile_mib: int, metrics: bool, squares: bool = False
) -> TokenScores:
    """Scores, in nats, of the tokens `label_N`, each predicted from its row of `hidden_ND`.

    Logits exist for one tile of rows at a time: about R · V · 12 bytes, kept under `tile_mib`. The head is frozen, so
    d logp / d hidden does not depend on the loss: it is computed while the tile exists and kept as (N, D), and the
    backward pass is one multiplication (two matrix products in all, without recomputation).
    """
    if head.weight_VD.requires_grad:
        raise NotImplementedError("a trained output head is not supported: its log-probs are computed for a frozen one")
    rows = max(16, tile_mib * 2**20 // (head.weight_VD.shape[0] * 12))
    logp, *others = _ResponseLogps.apply(hidden_ND, label_N, head, rows, metrics, squares)  # type: ignore[no-untyped-call]
    mean_logit, entropy, hit = others[:3] if metrics else (None, None, None)
    return TokenScores(logp, mean_logit, entropy, hit, others[3] if squares else None)


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, label_N: Tensor, head: Head, rows: int, metrics: bool, squares: bool
    ) -> tuple[Tensor, ...]:
        logp_N = torch.empty(len(label_N), dtype=torch.float32, device=hidden_ND.device)
        mean_N, entropy_N, hit_N, square_N = torch.zeros(4, len(label_N), device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(label_N), rows):
            tile = slice(start, start + rows)
            logit_RV = head_logits(hidden_ND[tile], head)
            lse_R = logit_RV.logsumexp(-1)
            label_R1 = label_N[tile, None]
            logp_N[tile] = logit_RV.gather(1, label_R1)[:, 0] - lse_R
            if not (metrics or squares) and slope_ND is None:
                del logit_RV  # freed before the next tile's
                continue
            prob_RV = (logit_RV - lse_R[:, None]).exp_()
            if metrics:
                mean_N[tile] = logit_RV.mean(-1)
                entropy_N[tile] = lse_R - torch.linalg.vecdot(prob_RV, logit_RV)
                hit_N[tile] = (logit_RV.argmax(-1) == label_R1[:, 0]).float()
            if squares:
                square_N[tile] = torch.linalg.vecdot(prob_RV, prob_RV).log()
            if slope_ND is not None:
                slope_ND[tile] = _hidden_slope(logit_RV, prob_RV, label_R1, head).to(slope_ND.dtype)
            del logit_RV, prob_RV
        ctx.save_for_backward(slope_ND)
        ctx.mark_non_differentiable(mean_N, entropy_N, hit_N, square_N)
        return logp_N, mean_N, entropy_N, hit_N, square_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        # Multiplied in float32 and rounded once, without an intermediate float32 matrix.
        grad_ND = torch.mul(slope_ND, gradients[0][:, None], out=torch.empty_like(slope_ND))
        return grad_ND, None, None, None, None, None


def head_logits(hidden_RD: Tensor, head: Head) -> Tensor:
    """float32 logits of one tile; on CUDA the product is never rounded to the compute type."""
    logit_RV = products.mm_fp32(hidden_RD, head.weight_VD.T)
    if head.bias_V is not None:
        logit_RV += head.bias_V.float()
    if head.scale != 1.0:
        logit_RV *= head.scale
    if head.softcap is not None:
        logit_RV = logit_RV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logit_RV


def _hidden_slope(logit_RV: Tensor, prob_RV: Tensor, label_R1: Tensor, head: Head) -> Tensor:
    """d logp / d hidden = (onehot − p) · cap′ · scale · W, shape (R, D). Overwrites both tiles."""
    slope_RV = prob_RV.neg_()
    place_R1 = torch.arange(len(slope_RV), device=slope_RV.device)[:, None]
    # Not scatter_add_: on CUDA it has no deterministic kernel.
    slope_RV.index_put_((place_R1, label_R1), torch.ones((), device=slope_RV.device), accumulate=True)
    if head.softcap is not None:
        slope_RV *= logit_RV.div_(head.softcap).square_().neg_().add_(1)
    if head.scale != 1.0:
        slope_RV *= head.scale
    return slope_RV.to(head.weight_VD.dtype) @ head.weight_VD


def plain_logps(logit_NV: Tensor, label_N: Tensor) -> Tensor:
    """The plain reference implementation: float32 log-softmax over full logits, gathered at the labels."""
    return nn.functional.log_softmax(logit_NV.float(), -1).gather(1, label_N[:, None])[:, 0]
