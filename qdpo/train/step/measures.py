"""The metrics of a step or an evaluation, and the denominator of each mean.

N response tokens of a row · P pairs. report/screen/metrics.md explains every name to users.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qdpo.data.tokens.pack import PairRow
from qdpo.model.fast.logps import TokenScores
from qdpo.model.fast.transfer import to_device
from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import Pairs
from qdpo.train.step.losses import rewards

# Metric name → the count that its sum is divided by.
MEAN_OVER = {
    "loss": "pairs",
    "rewards/chosen": "pairs",
    "rewards/rejected": "pairs",
    "rewards/margins": "pairs",
    "rewards/accuracies": "pairs",
    "rewards/ties": "pairs",
    "logps/chosen": "pairs",
    "logps/rejected": "pairs",
    "logps/chosen_per_token": "chosen tokens",
    "logps/rejected_per_token": "rejected tokens",
    "logits/chosen": "chosen tokens",
    "logits/rejected": "rejected tokens",
    "entropy": "tokens",
    "kl": "tokens",
    "mean_token_accuracy": "chosen tokens",
    "lengths/chosen": "pairs",
    "lengths/rejected": "pairs",
}


def pair_sums(pairs: Pairs, losses_P: Tensor, loss: LossConfig) -> dict[str, Tensor]:
    """Sums over the pairs, for every metric that is a mean over pairs and needs the reference."""
    chosen_P, rejected_P = rewards(pairs, loss)
    ties = (chosen_P == rejected_P).sum()
    return {
        "loss": losses_P.sum(),
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).sum() + 0.5 * ties,
        "rewards/ties": ties,
    }


def token_sums(scores: TokenScores, reference_N: Tensor | None, row: PairRow) -> dict[str, Tensor]:
    """Sums over the row's response tokens, for every other metric; `kl` only with a reference."""
    assert scores.mean_logit is not None and scores.entropy is not None and scores.hit is not None
    chosen_N = to_device(torch.from_numpy(row.sequence_N % 2 == 0), scores.logp.device)
    logp_N = scores.logp.double()

    def sides(value_N: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.where(chosen_N, value_N.double(), 0.0).sum()
        return chosen, value_N.double().sum() - chosen

    logp_c, logp_r = sides(logp_N)
    logit_c, logit_r = sides(scores.mean_logit)
    sums = {
        "logps/chosen": logp_c,
        "logps/rejected": logp_r,
        "logps/chosen_per_token": logp_c,
        "logps/rejected_per_token": logp_r,
        "logits/chosen": logit_c,
        "logits/rejected": logit_r,
        "entropy": scores.entropy.double().sum(),
        "mean_token_accuracy": sides(scores.hit)[0],
    }
    if reference_N is not None:
        log_r_N = (reference_N.double() - logp_N).clamp(max=80.0)
        sums["kl"] = (torch.expm1(log_r_N) - log_r_N).sum()
    return sums


def counts(rows: Sequence[PairRow]) -> dict[str, int]:
    """The divisors of MEAN_OVER for these rows."""
    chosen, rejected = sum(sum(row.lengths[0::2]) for row in rows), sum(sum(row.lengths[1::2]) for row in rows)
    return {
        "pairs": sum(len(row.pairs) for row in rows),
        "chosen tokens": chosen,
        "rejected tokens": rejected,
        "tokens": chosen + rejected,
    }


def means(sums: Mapping[str, float], rows: Sequence[PairRow]) -> dict[str, float]:
    """Metric values from sums over `rows`, in the order of MEAN_OVER."""
    number = counts(rows)
    sums = {**sums, "lengths/chosen": number["chosen tokens"], "lengths/rejected": number["rejected tokens"]}
    return {name: sums[name] / number[over] for name, over in MEAN_OVER.items() if name in sums}
