"""The losses as settings see them, without torch: names, the settings each takes, combinations without meaning.

The formulas are in train/loss.py; a new loss is one function there and one row here.
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
    """False: it uses only the policy's log-probs, so no pass with the adapter off is needed."""
    couples: bool = False
    """True: a pair's loss depends on the other pairs of the step."""


def _rule(source: str, takes: str, *, reference: bool = True, couples: bool = False) -> LossRule:
    return LossRule(source, frozenset(takes.split()), reference, couples)


# f-divergences act on the log-ratio, so they need a loss that depends on score differences alone.
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

# Names that other programs use.
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
    """The part of config.LossConfig that this module reads."""

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
    """Problems of the [loss] settings in combination; `given` holds the full names not at their default."""
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
                f"loss.name={name} needs loss.label_smoothing (the assumed share of swapped labels) above 0: at 0 "
                + ("its target has a log of 0; its paper advises 0.001." if name == "exo_pair" else "it is sigmoid.")
            )
    if "loss.divergence_alpha" in given and loss.divergence != "alpha_divergence":
        found.append("loss.divergence_alpha has an effect only with loss.divergence=alpha_divergence.")
    return found


def _without_effect(loss: LossSettings, given: Collection[str], shown: str) -> list[str]:
    """Problems: settings that affect none of the losses, and settings for all losses that one of them cannot take.

    Next to other losses, `sft` keeps its plain log-probs.
    """
    found = []
    for field, why in _WHY_NOT.items():
        without = [name for name in loss.name if field not in RULES[name].takes]
        if f"loss.{field}" not in given or not without:
            continue
        if len(without) == len(loss.name):
            found.append(f"loss.{field} has no effect with loss.name={shown}: {without[0]} {why}.")
        elif field in _FOR_ALL and without != ["sft"]:
            name = next(name for name in without if name != "sft")
            found.append(f"loss.{field} with loss.name={shown}: {name} {why}. Remove one of the two.")
    return found
