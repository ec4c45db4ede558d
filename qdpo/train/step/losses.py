"""Each loss as a pure function of the log-probs of response tokens, with its paper's equation on the same line.

P pairs. c, r: log π(y|x) of the chosen and the rejected answer, summed over its tokens; a, b: their log-ratios to the
reference, log π(y|x) − log π_ref(y|x). All in nats. A loss returns one value a pair, shape (P,); a step's loss is the
mean over its pairs. loss_rules.RULES holds each loss's settings, and the combinations that are not allowed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import Pairs, join

# e^80 is finite in float32; beyond it a divergence is constant, with gradient 0.
_LARGEST_EXPONENT = 80.0


def pair_losses(p: Pairs, loss: LossConfig) -> Tensor:
    """The weighted sum of the losses in loss.name, one value a pair, shape (P,)."""
    weights = loss.weights or [1.0] * len(loss.name)
    total = torch.zeros_like(p.c)
    for name, weight in zip(loss.name, weights, strict=True):
        total = total + weight * LOSSES[name](p, loss)
    return total if p.wpo_weight is None else total * p.wpo_weight


def loss_slopes(parts: Sequence[Pairs], loss: LossConfig) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses of all pairs of `parts` together, shape (P,), and for each part the gradient of their mean.

    A slope is d mean loss / d sum, shape (P of the part,), keyed by the field of Pairs. With the slopes, each part's
    gradient can be computed later and separately, even where the loss couples pairs.
    """
    joined = join(parts)
    leaves = {
        name: getattr(joined, name).detach().requires_grad_()
        for name in ("c", "r", "a", "b", "nll_c")
        if getattr(joined, name) is not None
    }
    with torch.enable_grad():
        losses_P = pair_losses(replace(joined, **leaves), loss)
        slopes = torch.autograd.grad(losses_P.mean(), list(leaves.values()), allow_unused=True)
    sizes = [len(part.c) for part in parts]
    split = {name: torch.split(slope, sizes) for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
    return losses_P.detach(), [{name: pieces[place] for name, pieces in split.items()} for place in range(len(parts))]


def rewards(p: Pairs, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Rewards of chosen and rejected for reports, shape (P,): β · log-ratio (DPO, section 4) for any loss.

    Without a reference: simpo, β · mean log-prob (its eq. 4); orpo, λ · mean log-prob; cpo and sft, β · log-prob.
    """
    if p.a is not None and p.b is not None:
        return loss.beta * p.a, loss.beta * p.b
    if "simpo" in loss.name:
        return loss.beta * p.c / p.tokens_c, loss.beta * p.r / p.tokens_r
    if "orpo" in loss.name:
        return loss.orpo_lambda * p.c / p.tokens_c, loss.orpo_lambda * p.r / p.tokens_r
    return loss.beta * p.c, loss.beta * p.r


# With a reference: functions of δ, the difference of the two scores.


def sigmoid(p: Pairs, loss: LossConfig) -> Tensor:
    """DPO; with label smoothing conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3)."""
    return _logistic(_margin(p, loss), loss.label_smoothing)  # 2305.18290 eq. 7: −log σ(βδ)


def sigmoid_norm(p: Pairs, loss: LossConfig) -> Tensor:
    """DPO on log-ratios per token."""
    return _logistic(_margin(p, loss, normalized=True), loss.label_smoothing)  # 2405.14734 eq. 4 with a reference


def hinge(p: Pairs, loss: LossConfig) -> Tensor:
    """SLiC as a loss on log-ratios."""
    return (1 - _margin(p, loss)).relu()  # 2309.06657 "hinge-norm": max(0, 1 − βδ)


def ipo(p: Pairs, loss: LossConfig) -> Tensor:
    """IPO on log-ratios per token, as in its authors' code; β is the paper's τ."""
    delta = _margin(p, loss, normalized=True) / loss.beta
    return (delta - 1 / (2 * loss.beta)) ** 2  # 2310.12036 eq. 17


def exo_pair(p: Pairs, loss: LossConfig) -> Tensor:
    """EXO: KL(q ‖ smoothed labels), q = σ(βδ)."""
    margin, smoothing = _margin(p, loss), torch.tensor(loss.label_smoothing, dtype=p.c.dtype, device=p.c.device)
    log_q, log_rest = logsigmoid(margin), logsigmoid(-margin)
    return log_q.exp() * (log_q - torch.log1p(-smoothing)) + log_rest.exp() * (log_rest - smoothing.log())  # eq. 16


def robust(p: Pairs, loss: LossConfig) -> Tensor:
    """Robust DPO: unbiased under a share ε of swapped labels."""
    margin, smoothing = _margin(p, loss), loss.label_smoothing
    clean, flipped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)  # 2403.00409, the rDPO loss


def discopop(p: Pairs, loss: LossConfig) -> Tensor:
    """DiscoPOP: logistic loss blended with the exponential one, u = βδ; e^(−u) σ(u/τ) is one exponential, so finite."""
    u = _margin(p, loss)
    mix = u / loss.discopop_tau
    return -logsigmoid(-mix).exp() * logsigmoid(u) + (logsigmoid(mix) - u).exp()  # 2406.08414 eq. 5


# With a reference: functions of both log-ratios.


def nca_pair(p: Pairs, loss: LossConfig) -> Tensor:
    """NCA: classifies the chosen answer against noise, so that its likelihood does not fall."""
    chosen, rejected = _ratio_rewards(p, loss)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)  # 2402.05369, NCA with K = 2


def bco_pair(p: Pairs, loss: LossConfig) -> Tensor:
    """BCO: a classifier of good and bad answers; without the paper's running reward shift."""
    chosen, rejected = _ratio_rewards(p, loss)
    return -logsigmoid(chosen) - logsigmoid(-rejected)  # 2404.04656


def sppo_hard(p: Pairs, loss: LossConfig) -> Tensor:
    """SPPO with certain labels: log-ratios are pulled towards ±1/(2β)."""
    a, b = _ratios(p, loss)
    return (a - 0.5 / loss.beta) ** 2 + (b + 0.5 / loss.beta) ** 2  # 2405.00675 eq. 4.7, P = 1 and 0


def apo_zero(p: Pairs, loss: LossConfig) -> Tensor:
    """APO-zero: chosen up, rejected down, each against the reference."""
    chosen, rejected = _ratio_rewards(p, loss)
    return 1 - chosen.sigmoid() + rejected.sigmoid()  # 2408.06266 eq. 7


def apo_down(p: Pairs, loss: LossConfig) -> Tensor:
    """APO-down: both down, the rejected answer further; for chosen answers worse than the model's own."""
    chosen, rejected = _ratio_rewards(p, loss)
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()  # 2408.06266 eq. 8


def dpop(p: Pairs, loss: LossConfig) -> Tensor:
    """DPO-Positive: DPO with a penalty while the chosen answer is below the reference."""
    a, b = _given(p.a), _given(p.b)
    penalty = loss.dpop_lambda * (-a).relu()
    return -logsigmoid(loss.beta * (a - b - penalty))  # 2402.13228 eq. 3


def aot(p: Pairs, loss: LossConfig) -> Tensor:
    """AOT, paired: quantile by quantile over the step, the policy's gaps exceed the reference's."""
    n_c, n_r = _divisors(p, loss)
    gap = p.c / n_c - p.r / n_r
    reference_gap = _given(p.reference_c) / n_c - _given(p.reference_r) / n_r
    return _logistic(loss.beta * (_sorted(gap) - _sorted(reference_gap)), loss.label_smoothing)  # 2406.05882, paired


def aot_unpaired(p: Pairs, loss: LossConfig) -> Tensor:
    """AOT, unpaired: quantile by quantile over the step, chosen log-ratios exceed rejected ones."""
    a, b = _ratios(p, loss)
    return _logistic(loss.beta * (_sorted(a) - _sorted(b)), loss.label_smoothing)  # 2406.05882, unpaired


# Without a reference.


def sft(p: Pairs, loss: LossConfig) -> Tensor:
    """Negative log-likelihood of the chosen answers; the step's mean is the mean over its chosen tokens."""
    return p.nll_c / p.mean_tokens_c


def simpo(p: Pairs, loss: LossConfig) -> Tensor:
    """SimPO: mean log-probs, a target margin γ."""
    chosen, rejected = loss.beta * p.c / p.tokens_c, loss.beta * p.r / p.tokens_r
    return -logsigmoid(chosen - rejected - loss.simpo_gamma)  # 2405.14734 eq. 6


def orpo(p: Pairs, loss: LossConfig) -> Tensor:
    """ORPO: likelihood of the chosen answer (a mean over its tokens) and the odds ratio, λ between them."""
    mean_c, mean_r = p.c / p.tokens_c, p.r / p.tokens_r
    odds_ratio = _log_odds(mean_c) - _log_odds(mean_r)
    return -mean_c - loss.orpo_lambda * logsigmoid(odds_ratio)  # 2403.07691 eq. 6 and 7


def cpo(p: Pairs, loss: LossConfig) -> Tensor:
    """CPO: DPO with a uniform reference, and the likelihood of the chosen answers as in `sft`."""
    return -logsigmoid(loss.beta * (p.c - p.r)) + sft(p, loss)  # 2401.08417 eq. 3


LOSSES = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop, nca_pair, bco_pair, sppo_hard, apo_zero,
        apo_down, dpop, aot, aot_unpaired, sft, simpo, orpo, cpo,
    )
}  # fmt: skip


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    loss = -(1 - smoothing) * logsigmoid(margin)
    return loss - smoothing * logsigmoid(-margin) if smoothing else loss


def _margin(p: Pairs, loss: LossConfig, *, normalized: bool = False) -> Tensor:
    """βδ = β (s(a) − s(b)), with the scores divided by the answers' tokens if `normalized`."""
    n_c, n_r = (p.tokens_c, p.tokens_r) if normalized else _divisors(p, loss)
    return loss.beta * (_score(_given(p.a), loss) / n_c - _score(_given(p.b), loss) / n_r)


def _score(ratio: Tensor, loss: LossConfig) -> Tensor:
    """f′(t) of the divergence at t = e^ratio, 0 at t = 1 (f-DPO, arXiv 2309.16240, table 1)."""
    if loss.divergence == "forward_kl":
        return 1 - (-ratio).clamp(max=_LARGEST_EXPONENT).exp()  # 1 − 1/t
    if loss.divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)  # log(2t / (1 + t))
    power = loss.divergence_alpha - 1
    if loss.divergence == "alpha_divergence" and abs(power) >= 1e-6:
        return ((power * ratio).clamp(max=_LARGEST_EXPONENT).exp() - 1) / power  # (t^(α−1) − 1) / (α − 1)
    return ratio  # log t


def _ratios(p: Pairs, loss: LossConfig) -> tuple[Tensor, Tensor]:
    n_c, n_r = _divisors(p, loss)
    return _given(p.a) / n_c, _given(p.b) / n_r


def _ratio_rewards(p: Pairs, loss: LossConfig) -> tuple[Tensor, Tensor]:
    a, b = _ratios(p, loss)
    return loss.beta * a, loss.beta * b


def _divisors(p: Pairs, loss: LossConfig) -> tuple[Tensor | float, Tensor | float]:
    return (p.tokens_c, p.tokens_r) if loss.length_normalized else (1.0, 1.0)


def _sorted(value: Tensor) -> Tensor:
    return torch.sort(value, stable=True).values


def _log_odds(logp: Tensor) -> Tensor:
    """log(q / (1 − q)) of q = e^logp < 1; a probability that rounds to 1 is taken as 1 − 1e-9."""
    logp = logp.clamp(max=-1e-9)
    return logp - torch.log(-torch.expm1(logp))


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "the reference was not computed"
    return value
