"""The step against a plain, obvious implementation, and its invariants."""

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qdpo.data.tokens.pack import PairRow, pack_rows, step_indices
from qdpo.data.tokens.sieve import TokenPair, load_pairs
from qdpo.errors import NonFiniteError
from qdpo.model.policy import adapter
from qdpo.run.folder import RunDir
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result
from qdpo.settings import layered
from qdpo.settings.loss_rules import RULES, needs_reference
from qdpo.settings.schema import LossConfig
from qdpo.train.policy.build import load_policy
from qdpo.train.start.length import plan_steps
from qdpo.train.step.feed import Feed, ready
from qdpo.train.step.measures import MEAN_OVER
from qdpo.train.step.optimizer import learning_rate, make_optimizer
from qdpo.train.step.step import score, train_step
from tests.conftest import Quiet, arguments

CPU = torch.device("cpu")


def plain_logp(model: Any, pair: TokenPair, answer: np.ndarray) -> torch.Tensor:
    """log π(answer | prompt): one unpadded sequence, full logits, log-softmax, gather, sum."""
    ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logps[len(pair.prompt) - 1 :].sum()


def plain_run(
    base: Path, pairs: list[TokenPair], steps: int, per_step: int, total: int, beta: float, smoothing: float
) -> list[dict]:
    """DPO as one would write it first: live reference, separate sequences, torch's AdamW, cosine schedule by hand."""
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()  # noqa: E731
    model = load().requires_grad_(False)
    policy = adapter.new_adapter(model, rank=16, alpha=32, targets=["all-linear"], rslora=False, seed=0)
    reference = load()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    warmup, log = math.ceil(steps / 10), []
    for step in range(steps):
        progress = (step - warmup) / (steps - warmup)
        rate = 1e-3 * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = rate
        chosen = [
            pairs[i] for i in step_indices(step, pairs=len(pairs), pairs_per_step=per_step, total_pairs=total, seed=0)
        ]
        optimizer.zero_grad()
        losses, policy_logps = [], []
        for pair in chosen:
            with torch.no_grad():
                c0, r0 = plain_logp(reference, pair, pair.chosen), plain_logp(reference, pair, pair.rejected)
            c, r = plain_logp(policy, pair, pair.chosen), plain_logp(policy, pair, pair.rejected)
            margin = torch.sigmoid(beta * ((c - c0) - (r - r0)))
            losses.append(-(1 - smoothing) * margin.log() - smoothing * (1 - margin).log())
            policy_logps.append((c.item(), r.item()))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        means = np.mean(policy_logps, axis=0)
        log.append(
            {"loss": loss.item(), "grad_norm": norm.item(), "logps/chosen": means[0], "logps/rejected": means[1]}
        )
    return log


@pytest.mark.parametrize(("smoothing", "row"), [(0.0, 0), (0.2, 150)])
def test_twenty_steps_equal_the_plain_implementation(
    train: Callable[..., tuple[Result, Quiet]],
    settings: dict[str, str],
    tiny_base: Path,
    smoothing: float,
    row: int,
) -> None:
    train(train__steps="20", loss__label_smoothing=str(smoothing), memory__tokens_per_row=str(row))
    run = RunDir(Path(settings["output.dir"]) / "run")
    pairs = load_pairs(run.train_pairs)
    expected = plain_run(tiny_base, pairs, 20, 4, 80, 0.1, smoothing)
    found = [record for record in read_metrics(run.metrics) if "loss" in record]
    assert len(found) == 20 and expected[-1]["loss"] < expected[0]["loss"] - 0.05
    for ours, plain in zip(found, expected, strict=True):
        for name, value in plain.items():
            assert ours[name] == pytest.approx(value, rel=1e-4), (ours["step"], name)


def make(settings: dict[str, str]) -> tuple[Any, list[TokenPair]]:
    """A policy with an untouched adapter, and pairs of ids that mean nothing."""
    config = layered.resolve(arguments(settings)).config
    rng = np.random.default_rng(0)
    pairs = [
        TokenPair(*(rng.integers(5, 300, rng.integers(3, 20), dtype=np.int32) for _ in range(3)), n)
        for n in range(1, 9)
    ]
    loaded = load_policy(
        config, Path(str(config.model.path)), device=CPU, dtype="fp32", probe_with=pairs[:2], say=lambda line: None
    )
    return loaded.policy, pairs


def step_with(
    policy: Any,
    rows: list[PairRow],
    reference: Callable[[TokenPair], Any] | None,
    rate: float = 0.0,
    loss: LossConfig = LossConfig(),  # noqa: B008
) -> tuple[Any, dict]:
    parameters = policy.adapter_parameters()
    optimizer = make_optimizer("adamw", list(parameters.values()), weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = rate
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    report = train_step(
        policy,
        list(parameters.values()),
        optimizer,
        scaler,
        [ready(row, reference) for row in rows],
        loss,
        max_grad_norm=1e9,
    )
    return report, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def zeros(pair: TokenPair) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(pair.chosen), np.float32), np.zeros(len(pair.rejected), np.float32)


def test_any_packing_gives_the_same_step(settings: dict[str, str]) -> None:
    policy, pairs = make(settings)
    first, expected = step_with(policy, pack_rows(pairs, 0), zeros)
    for budget in (64, 120, 10_000):
        rows = pack_rows(pairs, budget)
        assert len(rows) < len(pairs)
        report, gradients = step_with(policy, rows, zeros)
        assert report.values == pytest.approx(first.values, rel=2e-5, abs=1e-5) and report.pairs == 8
        largest = max(g.abs().max() for g in expected.values())
        assert all((gradients[name] - g).abs().max() <= 2e-6 * largest for name, g in expected.items())


def near(policy: Any, pairs: list[TokenPair]) -> Callable[[TokenPair], Any]:
    """A reference a few nats away from the policy, other for every token."""
    rng = np.random.default_rng(3)
    table = {}
    for pair in pairs:
        with torch.no_grad():
            logp = score(policy, PairRow([pair]), metrics=False).logp.numpy()
        moved = logp + rng.normal(0, 0.3, len(logp)).astype(np.float32)
        table[pair.row] = (moved[: len(pair.chosen)], moved[len(pair.chosen) :])
    return lambda pair: table[pair.row]


LISTS: dict[str, dict[str, Any]] = {
    "mpo": {"name": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]},
    "wpo": {"name": "sigmoid", "wpo": True},
    "wpo of sft": {"name": "sft", "wpo": True},
    "ld": {"name": "sigmoid", "ld_alpha": 0.3},
    "aot beside sft": {"name": ["aot", "sft"], "label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", [*RULES, *LISTS])
def test_micro_batches_give_the_step_of_one_batch(settings: dict[str, str], name: str) -> None:
    """For every loss, those that sort over the step and those with a token mean too: any packing, the same gradient."""
    policy, pairs = make(settings)
    # an adapter that has learned something, so that answers differ from the reference
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.adapter_parameters().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    smoothing = {"exo_pair": 0.1, "robust": 0.1}.get(name, 0.0)
    loss = LossConfig.model_validate(LISTS.get(name, {"name": name, "label_smoothing": smoothing}))
    reference = near(policy, pairs) if needs_reference(loss.name) else None
    whole, expected = step_with(policy, pack_rows(pairs, 10_000), reference, loss=loss)
    largest = max(g.abs().max() for g in expected.values())
    assert largest > 1e-4 and ("kl" in whole.values) == (reference is not None)
    for budget in (0, 70):
        report, gradients = step_with(policy, pack_rows(pairs, budget), reference, loss=loss)
        assert report.values == pytest.approx(whole.values, rel=2e-5, abs=1e-5)
        for parameter, gradient in expected.items():
            assert (gradients[parameter] - gradient).abs().max() <= 5e-6 * largest, parameter


def test_metrics_equal_their_definitions(settings: dict[str, str]) -> None:
    """Every metric of a step against full logits and plain means over pairs or tokens."""
    policy, pairs = make(settings)
    reference = near(policy, pairs)
    report, _ = step_with(policy, pack_rows(pairs, 70), reference)
    model = policy.peft
    sides: dict[str, list[Any]] = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, answer, ref in zip(sides, (pair.chosen, pair.rejected), reference(pair), strict=True):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, len(pair.prompt) - 1 : -1]
            logps = logits.log_softmax(-1)
            labels = torch.from_numpy(answer.astype(np.int64))
            policy_logp = logps.gather(1, labels[:, None])[:, 0].double()
            ratio = policy_logp - torch.from_numpy(ref).double()
            sides[side].append(
                {
                    "logp": policy_logp, "ratio": ratio, "logit": logits.mean(-1).double(),
                    "entropy": -(logps.exp() * logps).sum(-1).double(), "hit": (logits.argmax(-1) == labels).double(),
                    "kl": (-ratio).exp() - 1 + ratio,
                }
            )  # fmt: skip
    tokens = lambda side, what: torch.cat([answer[what] for answer in sides[side]])  # noqa: E731
    sums = lambda side, what: torch.stack([answer[what].sum() for answer in sides[side]])  # noqa: E731
    both = lambda what: torch.cat([tokens("chosen", what), tokens("rejected", what)])  # noqa: E731
    reward_c, reward_r = 0.1 * sums("chosen", "ratio"), 0.1 * sums("rejected", "ratio")
    expected = {
        "loss": -(reward_c - reward_r).sigmoid().log().mean(),
        "rewards/chosen": reward_c.mean(),
        "rewards/rejected": reward_r.mean(),
        "rewards/margins": (reward_c - reward_r).mean(),
        "rewards/accuracies": (reward_c > reward_r).double().mean(),
        "rewards/ties": torch.tensor(0.0),
        "entropy": both("entropy").mean(),
        "kl": both("kl").mean(),
        "mean_token_accuracy": tokens("chosen", "hit").mean(),
    }
    for side in sides:
        expected[f"logps/{side}"] = sums(side, "logp").mean()
        expected[f"logps/{side}_per_token"] = tokens(side, "logp").mean()
        expected[f"logits/{side}"] = tokens(side, "logit").mean()
        expected[f"lengths/{side}"] = torch.tensor(np.mean([len(getattr(pair, side)) for pair in pairs]))
    assert list(report.values) == list(MEAN_OVER) and set(report.values) == set(expected)
    for name, value in expected.items():
        assert report.values[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_rows_are_made_ready_one_step_ahead(settings: dict[str, str]) -> None:
    _, pairs = make(settings)
    asked: list[tuple[int, str]] = []

    def of(step: int) -> list[TokenPair]:
        asked.append((step, threading.current_thread().name))
        return pairs[2 * step : 2 * step + 2]

    with contextlib.closing(Feed(of, zeros, tokens_per_row=0, device=CPU)) as feed:
        for step in (0, 1, 3):
            rows = feed.rows(step, last=3)
            assert [row.row.pairs[0].row for row in rows] == [pair.row for pair in pairs[2 * step : 2 * step + 2]]
            reference = rows[0].reference_N
            assert reference is not None and len(reference) == sum(rows[0].row.lengths)
    # 0 and 3 were not expected; 1 was ready; 2, which nobody wanted, may have been dropped; nothing follows the last.
    ahead = {step: name.startswith("qdpo-feed") for step, name in asked}
    assert ahead in ({0: False, 1: True, 3: False}, {0: False, 1: True, 2: True, 3: False})


def test_an_untouched_adapter_has_no_margin(train: Callable[..., tuple[Result, Quiet]]) -> None:
    result, watcher = train(train__steps="1", model__quantization="nf4", model__dtype="bf16")
    start = watcher.records[0]
    assert start["step"] == 0 and start["eval_rewards/margins"] == 0 and start["eval_rewards/accuracies"] == 0.5
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-7) and start["eval_rewards/ties"] == 1
    assert start["eval_kl"] == 0
    first = watcher.records[1]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and first["loss"] == pytest.approx(
        math.log(2), abs=1e-7
    )


# What a loss moves from an untouched adapter, where it is not the margin; −1: down. discopop has a hump at zero margin.
MOVES = {name: ("logps/chosen_per_token", 1) for name in ("sft", "orpo", "cpo")}
MOVES |= {"apo_down": ("rewards/rejected", -1), "discopop": ("loss", -1)}


@pytest.mark.parametrize("name", [*RULES, "sigmoid+bco_pair+sft"])
def test_every_loss_trains_through_a_run(train: Callable[..., tuple[Result, Quiet]], name: str) -> None:
    changes = {"loss__label_smoothing": "0.1"} if name in ("exo_pair", "robust") else {}
    result, watcher = train(train__steps="8", loss__name=name, memory__tokens_per_row="120", **changes)
    metric, sign = MOVES.get(name, ("rewards/margins", 1))
    assert sign * (result.after[metric] - result.before[metric]) > 0.01
    # dpop weighs any held-out answer that falls below the reference 50 times
    assert result.after["loss"] < result.before["loss"] or name == "dpop"
    alone = not any(RULES[part].reference for part in name.split("+"))
    assert ("reference: not needed" in watcher.text) == alone == ("kl" not in result.after)
    assert ("reference log-probs", 40) not in watcher.stages or not alone


def test_a_loss_that_is_not_finite_stops_before_the_update(settings: dict[str, str]) -> None:
    policy, pairs = make(settings)
    before = {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}

    def broken(pair: TokenPair) -> tuple[np.ndarray, np.ndarray]:
        chosen, rejected = zeros(pair)
        return (chosen * np.nan if pair.row == 5 else chosen), rejected

    with pytest.raises(NonFiniteError, match="data rows 5\\."):
        step_with(policy, pack_rows(pairs, 0), broken, rate=1.0)
    assert all(torch.equal(p, before[name]) for name, p in policy.adapter_parameters().items())


def test_fp16_overflow_skips_the_update_and_is_counted(settings: dict[str, str]) -> None:
    policy, pairs = make(settings)
    parameters = policy.adapter_parameters()
    optimizer = make_optimizer("adamw", list(parameters.values()), weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    before = {name: p.detach().clone() for name, p in parameters.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
    report = train_step(
        policy,
        list(parameters.values()),
        optimizer,
        scaler,
        [ready(row, zeros) for row in pack_rows(pairs, 0)],
        LossConfig(),
        max_grad_norm=1.0,
    )
    assert report.overflow
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_fp16_trains(train: Callable[..., tuple[Result, Quiet]]) -> None:
    result, _ = train(train__steps="6", model__dtype="fp16", model__quantization="nf4")
    assert result.after["rewards/margins"] > 0.01 and result.overflows <= 2


def test_the_8_bit_optimizer_follows_the_fp32_one(train: Callable[..., tuple[Result, Quiet]]) -> None:
    margins = {}
    for optimizer in ("adamw", "paged_adamw8bit"):
        result, watcher = train(train__steps="8", train__optimizer=optimizer, output__name=optimizer)
        margins[optimizer] = result.after["rewards/margins"]
    assert "optimizer: adamw8bit (the CPU" in watcher.text
    assert margins["paged_adamw8bit"] == pytest.approx(margins["adamw"], rel=0.1)


def test_schedules() -> None:
    rates = {
        s: [learning_rate(i, steps=10, warmup_steps=2, peak=1.0, schedule=s) for i in range(10)]
        for s in ("cosine", "linear", "constant")
    }
    assert all(values[:2] == [0.5, 1.0] for values in rates.values())
    assert rates["constant"][9] == 1 and rates["linear"][6] == 0.5 and rates["cosine"][6] == pytest.approx(0.5)
    assert 0 < rates["cosine"][9] < rates["linear"][9] < 0.2


def test_plans(settings: dict[str, str]) -> None:
    train = layered.resolve(arguments(settings)).config.train
    assert plan_steps(train, 30).steps == 8 and plan_steps(train, 30).total_pairs == 30
    assert plan_steps(train.model_copy(update={"epochs": 2.5}), 30).total_pairs == 75
    assert plan_steps(train.model_copy(update={"steps": 3}), 30).total_pairs == 12
    assert plan_steps(train, 30, at_most=5).total_pairs == 20
