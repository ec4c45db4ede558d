"""Every loss: golden values, the paper's formula written out, finite differences, limits, and what swapping does."""

import importlib.util
import json
import math
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qdpo.settings.loss_rules import RULES
from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import Pairs, join, sum_pairs
from qdpo.train.step.losses import LOSSES, loss_slopes, pair_losses, rewards
from tests.conftest import ROOT

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}


def config(name: str, **settings: Any) -> LossConfig:
    return LossConfig.model_validate({"name": name, "label_smoothing": SMOOTHED.get(name, 0.0), **settings})


def sums(
    a: Tensor, b: Tensor, *, c: Tensor | None = None, r: Tensor | None = None, tokens: tuple[int, int] = (7, 4)
) -> Pairs:
    """Pairs with log-ratios a and b; the policy's log-probs are c and r, or follow from references of −30 and −40."""
    reference_c, reference_r = torch.full_like(a, -30.0), torch.full_like(b, -40.0)
    c, r = reference_c + a if c is None else c, reference_r + b if r is None else r
    n_c, n_r = torch.full_like(a, tokens[0]), torch.full_like(b, tokens[1])
    return Pairs(
        c=c,
        r=r,
        a=a,
        b=b,
        reference_c=reference_c,
        reference_r=reference_r,
        nll_c=-c,
        tokens_c=n_c,
        tokens_r=n_r,
        mean_tokens_c=n_c,
        wpo_weight=None,
    )


def check_golden() -> ModuleType:
    loader = SourceFileLoader("check_golden", str(ROOT / "scripts" / "check_golden"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_golden", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def test_golden_values_of_the_incumbent(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_golden().main([str(GOLDEN)]) == 0
    assert "47 cases, 0 failed" in capsys.readouterr().out


def test_a_wrong_golden_value_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = json.loads(GOLDEN.read_text())
    cases["cases"][5]["expected"]["loss"] *= 1 + 1e-8
    cases["cases"][9]["expected"]["grad"]["chosen"][0][0] *= 1 + 1e-6
    (tmp_path / "wrong.json").write_text(json.dumps(cases))
    assert check_golden().main([str(tmp_path / "wrong.json")]) == 1
    assert "47 cases, 2 failed" in capsys.readouterr().out


def test_every_loss_is_one_function_and_one_rule() -> None:
    assert set(LOSSES) == set(RULES)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(logp: float) -> float:
    return math.exp(logp) / (1 - math.exp(logp))


# The papers' formulas with plain exp and log, for one pair: a, b, c, r; |y_c| = 7, |y_r| = 4, β = 0.3, ε = 0.1.
PLAIN: dict[str, Callable[[float, float, float, float], float]] = {
    "sigmoid": lambda a, b, c, r: -0.9 * math.log(sigma(0.3 * (a - b))) - 0.1 * math.log(sigma(-0.3 * (a - b))),
    "sigmoid_norm": lambda a, b, c, r: (
        -0.9 * math.log(sigma(0.3 * (a / 7 - b / 4))) - 0.1 * math.log(sigma(0.3 * (b / 4 - a / 7)))
    ),
    "hinge": lambda a, b, c, r: max(0.0, 1 - 0.3 * (a - b)),
    "ipo": lambda a, b, c, r: (a / 7 - b / 4 - 1 / 0.6) ** 2,
    "exo_pair": lambda a, b, c, r: (
        sigma(0.3 * (a - b)) * math.log(sigma(0.3 * (a - b)) / 0.9)
        + sigma(0.3 * (b - a)) * math.log(sigma(0.3 * (b - a)) / 0.1)
    ),
    "robust": lambda a, b, c, r: (
        (-0.9 * math.log(sigma(0.3 * (a - b))) + 0.1 * math.log(sigma(0.3 * (b - a)))) / 0.8
    ),
    "discopop": lambda a, b, c, r: (
        (1 - sigma(6 * (a - b))) * -math.log(sigma(0.3 * (a - b))) + sigma(6 * (a - b)) * math.exp(-0.3 * (a - b))
    ),
    "nca_pair": lambda a, b, c, r: (
        -math.log(sigma(0.3 * a)) - math.log(sigma(-0.3 * a)) / 2 - math.log(sigma(-0.3 * b)) / 2
    ),
    "bco_pair": lambda a, b, c, r: -math.log(sigma(0.3 * a)) - math.log(sigma(-0.3 * b)),
    "sppo_hard": lambda a, b, c, r: (a - 1 / 0.6) ** 2 + (b + 1 / 0.6) ** 2,
    "apo_zero": lambda a, b, c, r: 1 - sigma(0.3 * a) + sigma(0.3 * b),
    "apo_down": lambda a, b, c, r: sigma(0.3 * a) + 1 - sigma(0.3 * (a - b)),
    "dpop": lambda a, b, c, r: -math.log(sigma(0.3 * (a - b - 5 * max(0.0, -a)))),
    "sft": lambda a, b, c, r: -c / 7,
    "simpo": lambda a, b, c, r: -math.log(sigma(0.3 * (c / 7 - r / 4) - 1.0)),
    "orpo": lambda a, b, c, r: -c / 7 - 0.2 * math.log(sigma(math.log(odds(c / 7) / odds(r / 4)))),
    "cpo": lambda a, b, c, r: -math.log(sigma(0.3 * (c - r))) - c / 7,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_each_loss_is_its_papers_formula(name: str) -> None:
    smoothing = 0.1 if "label_smoothing" in RULES[name].takes else 0.0
    settings = config(name, beta=0.3, label_smoothing=smoothing, dpop_lambda=5.0, orpo_lambda=0.2)
    a, b = torch.tensor([2.0, -1.5, 0.4, -0.2]).double(), torch.tensor([-1.0, 0.7, 1.1, -3.0]).double()
    found = pair_losses(sums(a, b), settings)
    for place in range(4):
        values = a[place].item(), b[place].item(), a[place].item() - 30, b[place].item() - 40
        assert found[place].item() == pytest.approx(PLAIN[name](*values), rel=1e-10), place


def test_aot_compares_quantiles_of_the_whole_step() -> None:
    a, b = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([0.0, 3.0, -2.0]).double()
    c = torch.tensor([-10.0, -50.0, -20.0]).double()
    pairs = sums(a, b, c=c, r=torch.zeros(3).double())
    loss = lambda margins: sum(-math.log(sigma(0.3 * m)) for m in margins) / 3  # noqa: E731
    unpaired = pair_losses(pairs, config("aot_unpaired", beta=0.3)).mean().item()
    assert unpaired == pytest.approx(loss([-1.0 + 2, 0.5 - 0, 2.0 - 3]))
    # Paired: the sorted gaps −50, −20, −10 of the policy over the reference's gaps of 10 each (−30 + 40).
    assert pair_losses(pairs, config("aot", beta=0.3)).mean().item() == pytest.approx(loss([-60.0, -30.0, -20.0]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_the_derivative_of_their_f(divergence: str) -> None:
    """f-DPO table 1: f(t) of each divergence, differentiated at t = e^x; every f′ is 0 at t = 1 here."""
    alpha = 0.3
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda t: t * t.log() - t,
        "forward_kl": lambda t: -t.log() + t,
        "js_divergence": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
        "alpha_divergence": lambda t: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)),
    }
    x = torch.tensor([-1.2, -0.1, 0.0, 0.3, 1.7]).double()
    t = x.exp().requires_grad_()
    (slope,) = torch.autograd.grad(functions[divergence](t).sum(), t)
    settings = config("hinge", beta=0.1, divergence=divergence, divergence_alpha=alpha)
    found = (1 - pair_losses(sums(x, torch.zeros_like(x)), settings)) / 0.1
    assert torch.allclose(found, slope, atol=1e-9)
    limit = config("hinge", beta=0.1, divergence="alpha_divergence", divergence_alpha=1 - 1e-9)
    assert torch.allclose((1 - pair_losses(sums(x, torch.zeros_like(x)), limit)) / 0.1, x)


# At a = b = 0, with β = 0.1 and ε = 0.1 where it is needed.
AT_ZERO = {
    "sigmoid": math.log(2), "sigmoid_norm": math.log(2), "hinge": 1.0, "ipo": 25.0, "robust": math.log(2),
    "exo_pair": -math.log(2) - 0.5 * math.log(0.09), "discopop": (math.log(2) + 1) / 2, "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "dpop": math.log(2),
    "aot": math.log(2), "aot_unpaired": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", AT_ZERO)
def test_value_at_zero_margin(name: str, divergence: str) -> None:
    if divergence != "reverse_kl" and "divergence" not in RULES[name].takes:
        return
    zero = torch.zeros(3).double()
    assert pair_losses(sums(zero, zero), config(name, divergence=divergence)).tolist() == pytest.approx(
        [AT_ZERO[name]] * 3, rel=1e-12
    )


def slopes(name: str, a: Tensor, b: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """d loss / d log-prob of chosen and rejected, summed over all ways it enters."""
    (found,) = loss_slopes([sums(a, b)], config(name, **settings))[1]
    zero = torch.zeros_like(a)
    chosen = found.get("c", zero) + found.get("a", zero) - found.get("nll_c", zero)
    return chosen, found.get("r", zero) + found.get("b", zero)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_raises_the_chosen_answer_over_the_rejected(name: str) -> None:
    """At zero margin, but for two: apo_down lowers both answers, and discopop has a hump there."""
    zero = torch.zeros(1).double()
    chosen, rejected = slopes(name, zero, zero)
    if name == "apo_down":
        assert chosen.item() == 0 and rejected.item() > 0
        lower_c, lower_r = slopes(name, zero + 1, zero + 3)
        assert lower_c.item() < lower_r.item() and lower_r.item() > 0
    elif name == "discopop":
        assert chosen.item() > 0 > rejected.item()
        away_c, away_r = slopes(name, zero + 3, zero - 3)
        assert away_c.item() < 0 < away_r.item()
    elif name == "sft":
        assert chosen.item() == pytest.approx(-1 / 7) and rejected.item() == 0
    else:
        assert chosen.item() < 0 < rejected.item()


# What the loss of the swapped pair is: the same function at −δ, or a formula of its own.
@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "robust", "discopop", "bco_pair", "apo_zero", "nca_pair", "sppo_hard"]
)
def test_swapping_the_answers(name: str) -> None:
    a, b = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).double() * 3
    forward = pair_losses(sums(a, b), config(name))
    swapped = pair_losses(sums(b, a), config(name))
    beta = 0.1
    if name in ("sigmoid", "bco_pair"):  # −log σ(−x) = x − log σ(x)
        assert torch.allclose(swapped - forward, beta * (a - b))
    elif name == "robust":
        assert torch.allclose(swapped - forward, beta * (a - b) / 0.8)
    elif name == "apo_zero":
        assert torch.allclose(swapped + forward, torch.full_like(a, 2.0))
    elif name == "sppo_hard":
        assert torch.allclose(swapped - forward, 2 * (a - b) / beta)
    elif name == "hinge":
        assert torch.allclose(swapped, (1 + beta * (a - b)).relu())
    elif name == "nca_pair":
        assert torch.allclose(swapped - forward, (beta * a).sigmoid().log() - (beta * b).sigmoid().log())
    else:  # the logistic and the exponential part change places with their weights
        u, m = beta * (a - b), (beta * (a - b) / 0.05).sigmoid()
        assert torch.allclose(swapped, m * -(-u).sigmoid().log() + (1 - m) * u.exp())


def test_smoothing_is_a_mixture_of_both_labels() -> None:
    a, b = torch.randn(2, 8, dtype=torch.float64)
    mixed = 0.7 * pair_losses(sums(a, b), config("sigmoid")) + 0.3 * pair_losses(sums(b, a), config("sigmoid"))
    assert torch.allclose(pair_losses(sums(a, b), config("sigmoid", label_smoothing=0.3)), mixed)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_huge_log_ratios_stay_finite(name: str, divergence: str) -> None:
    if divergence != "reverse_kl" and "divergence" not in RULES[name].takes:
        return
    for a, b in [(1000.0, 0.0), (-1000.0, 0.0), (0.0, 1000.0), (0.0, -1000.0), (1000.0, -1000.0), (-1000.0, 1000.0)]:
        # log-probs of 1,000 nats and more below 0, so that both answers are possible ones
        logps = [torch.full((9,), value / 9 - 250.0, dtype=torch.float32, requires_grad=True) for value in (a, b)]
        reference = torch.full((18,), -250.0)
        pairs = sum_pairs(torch.cat(logps), reference, [9, 9], config(name), mean_tokens_c=9)
        loss = pair_losses(pairs, config(name, divergence=divergence)).sum()
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in logps)


def test_a_divergence_is_constant_beyond_its_largest_exponent() -> None:
    """e^-x of forward KL at x = −100 and −1000 are both e^80, with gradient 0."""
    far = torch.tensor([-100.0, -1000.0]).double()
    values = pair_losses(sums(far, torch.zeros_like(far)), config("hinge", divergence="forward_kl"))
    assert values[0] == values[1] and values[0].item() == pytest.approx(0.1 * math.exp(80), rel=1e-9)
    assert slopes("hinge", far, torch.zeros_like(far), divergence="forward_kl")[0].tolist() == [0, 0]


def test_orpo_takes_a_certain_answer() -> None:
    logp = torch.tensor([0.0, -2.0], requires_grad=True)
    loss = pair_losses(sum_pairs(logp, None, [1, 1], config("orpo"), mean_tokens_c=1), config("orpo")).sum()
    loss.backward()
    assert loss.isfinite() and logp.grad is not None and logp.grad.isfinite().all()


def token_case(name: str, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 5, 6, 2, 4, 4]
    draw = lambda: -3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) - 0.05  # noqa: E731
    return draw().requires_grad_(), draw(), lengths


MODIFIERS: dict[str, dict[str, Any]] = {
    "plain": {}, "ld": {"ld_alpha": 0.3}, "per token": {"length_normalized": True},
    "forward": {"divergence": "forward_kl"}, "js": {"divergence": "js_divergence"},
    "alpha": {"divergence": "alpha_divergence", "divergence_alpha": 1.7},
}  # fmt: skip


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name: str, modifier: str) -> None:
    settings = MODIFIERS[modifier]
    if not {field for field in settings if field != "divergence_alpha"} <= RULES[name].takes:
        return
    logp, reference, lengths = token_case(name, seed=4)
    beta = 0.05 if name == "hinge" else 0.7  # a margin above 1 would be flat
    loss = config(name, **{**settings, "beta": beta, "dpop_lambda": 2.0})

    def total(value: Tensor) -> Tensor:
        pairs = sum_pairs(value, reference if RULES[name].reference else None, lengths, loss, mean_tokens_c=13 / 3)
        return pair_losses(pairs, loss).mean()

    assert torch.autograd.gradcheck(total, (logp,))
    (gradient,) = torch.autograd.grad(total(logp), logp)
    assert gradient.abs().max() > 1e-4


def test_wpo_weighs_without_a_gradient_of_its_own() -> None:
    logp, reference, lengths = token_case("sigmoid", seed=5)
    squares = -2 * torch.rand(sum(lengths), dtype=torch.float64)
    settings = config("sigmoid", wpo=True)
    pairs = sum_pairs(logp, reference, lengths, settings, mean_tokens_c=4.0, log_square_N=squares)
    gaps = [part.mean().item() for part in torch.split((logp - squares).detach(), lengths)]
    weights = [math.exp(gaps[0] + gaps[1]), math.exp(gaps[2] + gaps[3]), math.exp(gaps[4] + gaps[5])]
    plain = sum_pairs(logp, reference, lengths, config("sigmoid"), mean_tokens_c=4.0)
    expected = pair_losses(plain, config("sigmoid")) * torch.tensor(weights)
    assert torch.allclose(pair_losses(pairs, settings), expected)
    (found,) = torch.autograd.grad(pair_losses(pairs, settings).sum(), logp, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected.sum(), logp)
    assert torch.allclose(found, by_hand)


def test_ld_weighs_the_tail_of_the_longer_answer() -> None:
    logp, reference, lengths = token_case("sigmoid", seed=6)
    pairs = sum_pairs(logp, reference, lengths, config("sigmoid", ld_alpha=0.25), mean_tokens_c=4.0)
    ratio = (logp - reference).detach()
    assert pairs.a is not None and pairs.b is not None
    assert pairs.a[0].item() == pytest.approx(ratio[:3].sum().item())
    assert pairs.b[0].item() == pytest.approx(ratio[3:6].sum().item() + 0.25 * ratio[6:8].sum().item())
    assert pairs.a[1].item() == pytest.approx(ratio[8:10].sum().item() + 0.25 * ratio[10:14].sum().item())
    assert pairs.nll_c[1].item() == pytest.approx(-logp[8:14].sum().item())


def test_a_list_is_a_weighted_sum() -> None:
    a, b = torch.randn(2, 5, dtype=torch.float64)
    mpo = LossConfig.model_validate({"name": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]})
    parts = [w * pair_losses(sums(a, b), config(n)) for n, w in (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))]
    assert torch.allclose(pair_losses(sums(a, b), mpo), parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_of_a_joined_step_are_its_gradient(name: str) -> None:
    """What a step is trained with when its pairs are coupled: the same gradient as in one piece."""
    logp, reference, lengths = token_case(name, seed=8)
    given = reference if RULES[name].reference else None
    whole = sum_pairs(logp, given, lengths, config(name), mean_tokens_c=13 / 3)
    (expected,) = torch.autograd.grad(pair_losses(whole, config(name)).mean(), logp)
    cut = sum(lengths[:2])
    parts = [
        sum_pairs(logp[:cut], None if given is None else given[:cut], lengths[:2], config(name), mean_tokens_c=13 / 3),
        sum_pairs(logp[cut:], None if given is None else given[cut:], lengths[2:], config(name), mean_tokens_c=13 / 3),
    ]
    losses, found = loss_slopes(parts, config(name))
    assert torch.allclose(losses, pair_losses(join(parts), config(name)))
    outputs = [getattr(part, field) for part, slope in zip(parts, found, strict=True) for field in slope]
    (gradient,) = torch.autograd.grad(outputs, logp, [value for slope in found for value in slope.values()])
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_rewards_are_beta_times_the_log_ratio_or_what_is_compared() -> None:
    a, b = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()
    assert [x.item() for x in rewards(sums(a, b), config("ipo", beta=0.5))] == [1.0, -0.5]
    alone = sum_pairs(torch.tensor([-1.0, -2.0, -4.0]), None, [2, 1], config("simpo"), mean_tokens_c=2)
    assert [x.item() for x in rewards(alone, config("simpo"))] == [-3.0, -8.0]
    assert [x.item() for x in rewards(alone, config("cpo", beta=0.5))] == [-1.5, -2.0]
    assert [x.item() for x in rewards(alone, config("orpo"))] == pytest.approx([-0.15, -0.4])
