"""What each loss is and takes, without torch: names for the settings, combinations that have no meaning.

The formulas are in train/loss.py; adding a loss is one function there and one row here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class LossRule:
    """One loss."""

    source: str
    """Paper and equation."""
    takes: frozenset[str]
    """Settings of [loss] that act on it."""
    reference: bool = True
    """False: it compares the policy's log-probs alone, so that nothing is computed with the adapter off."""
    couples: bool = False
    """True: a pair's loss depends on the other pairs of the step."""


def _rule(source: str, takes: str, *, reference: bool = True, couples: bool = False) -> LossRule:
    return LossRule(source, frozenset(takes.split()), reference, couples)


# The score that f-divergences act on is the log-ratio, so they need a loss that reads nothing but score differences.
_DELTA = "beta divergence ld_alpha wpo"
_RATIOS = "beta ld_alpha wpo length_normalized"

RULES = {
    "sigmoid": _rule("DPO, arXiv 2305.18290, eq. 7", f"{_DELTA} label_smoothing length_normalized"),
    "sigmoid_norm": _rule("SimPO, arXiv 2405.14734, eq. 4, with a reference", f"{_DELTA} label_smoothing"),
    "hinge": _rule("SLiC, arXiv 2305.10425, section 2; RSO, arXiv 2309.06657", f"{_DELTA} length_normalized"),
    "ipo": _rule("IPO, arXiv 2310.12036, eq. 17", _DELTA),
    "exo_pair": _rule("EXO, arXiv 2402.00856, eq. 16", f"{_DELTA} label_smoothing length_normalized"),
    "robust": _rule("Robust DPO, arXiv 2403.00409", f"{_DELTA} label_smoothing length_normalized"),
    "discopop": _rule("DiscoPOP, arXiv 2406.08414, eq. 5", f"{_DELTA} length_normalized discopop_tau"),
    "nca_pair": _rule("NCA, arXiv 2402.05369", _RATIOS),
    "bco_pair": _rule("BCO, arXiv 2404.04656, without its reward shift", _RATIOS),
    "sppo_hard": _rule("SPPO, arXiv 2405.00675, eq. 4.7 with hard labels", _RATIOS),
    "apo_zero": _rule("APO, arXiv 2408.06266, eq. 7", _RATIOS),
    "apo_down": _rule("APO, arXiv 2408.06266, eq. 8", _RATIOS),
    "dpop": _rule("DPO-Positive, arXiv 2402.13228, eq. 3", "beta ld_alpha wpo dpop_lambda"),
    "aot": _rule("AOT, arXiv 2406.05882, paired", "beta label_smoothing ld_alpha length_normalized", couples=True),
    "aot_unpaired": _rule(
        "AOT, arXiv 2406.05882, unpaired", "beta label_smoothing ld_alpha length_normalized", couples=True
    ),
    "sft": _rule("negative log-likelihood of the chosen answers, a token mean", "wpo", reference=False),
    "simpo": _rule("SimPO, arXiv 2405.14734, eq. 6", "beta simpo_gamma wpo", reference=False),
    "orpo": _rule("ORPO, arXiv 2403.07691, eq. 6", "orpo_lambda wpo", reference=False),
    "cpo": _rule("CPO, arXiv 2401.08417, eq. 3 with its likelihood term", "beta wpo", reference=False),
}  # fmt: skip

# Names that were in use elsewhere.
RENAMED = {"aot_pair": "aot_unpaired"}

_WHY_NOT = {
    "beta": "has no beta",
    "label_smoothing": "has no term for swapped labels",
    "divergence": "does not compare two scores, so another divergence has no meaning there",
    "ld_alpha": "has no sum of log-ratios whose tail could be weighted",
    "wpo": "sorts the answers of a step, so a pair has no loss of its own to weigh",
    "length_normalized": "is not a function of summed log-ratios alone, or is normalised by length already",
}
_WHY_NOT |= {name: "does not use it" for name in ("discopop_tau", "dpop_lambda", "simpo_gamma", "orpo_lambda")}

_FOR_ALL = {"divergence", "ld_alpha", "wpo", "length_normalized"}


class LossSettings(Protocol):
    """The part of config.LossConfig that is looked at here."""

    @property
    def name(self) -> list[str]: ...
    @property
    def weights(self) -> list[float] | None: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def divergence(self) -> str: ...


def needs_reference(names: Collection[str]) -> bool:
    """True if any of the losses compares with the reference."""
    return any(RULES[name].reference for name in names)


def couples_pairs(names: Collection[str]) -> bool:
    """True if a pair's loss depends on the other pairs of its step."""
    return any(RULES[name].couples for name in names)


def default_beta(names: Sequence[str]) -> float:
    """0.1; 2.0 for SimPO without a loss that has a reference: its rewards are means over tokens, not sums."""
    known = [name for name in names if name in RULES]
    return 2.0 if "simpo" in known and not needs_reference(known) else 0.1


def loss_problems(loss: LossSettings, given: Collection[str]) -> list[str]:
    """What is wrong with the settings of [loss] taken together; `given` holds the full names not at their default."""
    shown = "+".join(loss.name)
    found = []
    if len(set(loss.name)) < len(loss.name):
        found.append(f"loss.name={shown} names a loss twice. Name each once; loss.weights says how much it counts.")
    if loss.weights is not None and len(loss.weights) != len(loss.name):
        found.append(f"loss.weights has {len(loss.weights)} numbers for {len(loss.name)} losses ({shown}).")
    found += _without_effect(loss, given, shown)
    for name in {"exo_pair", "robust"} & set(loss.name):
        if loss.label_smoothing == 0:
            found.append(
                f"loss.name={name} needs loss.label_smoothing above 0, the share of labels taken to be swapped: at 0 "
                + ("its target has a log of 0; its paper advises 0.001." if name == "exo_pair" else "it is sigmoid.")
            )
    if "loss.divergence_alpha" in given and loss.divergence != "alpha_divergence":
        found.append("loss.divergence_alpha acts only with loss.divergence=alpha_divergence.")
    return found


def _without_effect(loss: LossSettings, given: Collection[str], shown: str) -> list[str]:
    """Settings that act on no loss; and, of those that change what every loss sees, ones that a loss cannot take.

    Beside other losses `sft` keeps its plain log-probs.
    """
    found = []
    for field, why in _WHY_NOT.items():
        without = [name for name in loss.name if field not in RULES[name].takes]
        if f"loss.{field}" not in given or not without:
            continue
        if len(without) == len(loss.name):
            found.append(f"loss.{field} acts on none of loss.name={shown}: {without[0]} {why}.")
        elif field in _FOR_ALL and without != ["sft"]:
            name = next(name for name in without if name != "sft")
            found.append(f"loss.{field} beside loss.name={shown}: {name} {why}. Take one of the two out.")
    return found
