"""The page that explains metrics and losses: every name has its section, and what it states is what the code does."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qdpo.errors import ConfigError
from qdpo.report.screen.explain import PAGE, explain
from qdpo.run.record import Result
from qdpo.settings.loss_rules import RULES, default_beta
from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import Pairs
from qdpo.train.step.losses import LOSSES
from qdpo.train.step.measures import MEAN_OVER
from tests.conftest import ROOT, Quiet, qdpo

METRICS = [*MEAN_OVER, "grad_norm", "learning_rate", "tokens_per_s", "pairs_per_s", "peak_gib", "num_tokens", "step"]
METRICS += [
    "samples/tokens",
    "samples/cut",
    "samples/repetition",
    "epoch",
    "overflows",
    "eval_",
    "perplexity/chosen",
    "perplexity/rejected",
]
SETTINGS = list(LossConfig.model_fields)


def heading(name: str) -> str:
    return explain(name).splitlines()[0]


def bullets(name: str) -> dict[str, str]:
    """The section's list items by their first words: Formula, Range, Takes, …"""
    text = re.sub(r"\n  ", " ", explain(name))
    return dict(re.findall(r"^- ([A-Z][\w ,]*): (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("name", [*METRICS, *RULES, *SETTINGS])
def test_every_name_has_one_section(name: str) -> None:
    assert f"`{name}`" in heading(name)
    assert len(re.findall(rf"^#+ .*`{re.escape(name)}`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == 1


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_its_curve_means(name: str) -> None:
    found = bullets(name)
    assert {"Formula", "Range", "In the loss"} <= found.keys()
    assert {"Rising", "Falling"} <= found.keys() or "Rising, falling" in found


def test_everything_a_run_records_is_explained(train: Callable[..., tuple[Result, Quiet]]) -> None:
    _, watcher = train(train__steps="1")
    recorded = {name for record in watcher.records for name in record}
    assert {"loss", "eval_loss", "grad_norm"} <= recorded
    for name in recorded:
        assert f"`{name.removeprefix('eval_')}`" in heading(name), name


@pytest.mark.parametrize("name", RULES)
def test_a_loss_is_described_as_its_rule_says(name: str) -> None:
    rule, found = RULES[name], bullets(name)
    assert {"Formula", "Source", "Pick it"} <= found.keys()
    assert set(re.findall(r"`(\w+)`", found["Takes"].split(". ")[0])) == rule.takes
    assert found["Reference"] == ("yes." if rule.reference else "none.")
    assert ("Couples the pairs" in explain(name)) == rule.couples
    assert set(re.findall(r"arXiv (\S{10})", rule.source)) <= set(re.findall(r"arXiv (\S{10})", found["Source"]))


@pytest.mark.parametrize("name", ["discopop_tau", "dpop_lambda", "simpo_gamma", "orpo_lambda", "divergence_alpha"])
def test_stated_defaults_are_the_defaults(name: str) -> None:
    stated = re.search(rf"`{name}`\s\(default ([\d.]*\d)\)", explain(name))
    assert stated and float(stated[1]) == getattr(LossConfig(), name)


def stated_at_zero_margin() -> dict[str, tuple[bool, float]]:
    """The page's table: loss → whether the likelihood n is to be added, and the number."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| (n?)(?: ?\+? ?)([\d.]*) \|$", explain("losses"), re.MULTILINE)
    return {name: (with_n == "n", float(number or 0)) for name, with_n, number in rows}


def at_zero_margin(name: str, label_smoothing: float) -> tuple[float, float]:
    """The loss of three pairs whose policy is the reference and whose answers are alike; and n, their likelihood."""
    logp_P, tokens_P = torch.tensor([-20.0, -3.0, -7.0], dtype=torch.float64), torch.tensor([10.0, 2.0, 9.0]).double()
    zero_P, mean_P = torch.zeros_like(logp_P), tokens_P.mean().expand(3)
    pairs = Pairs(
        c=logp_P,
        r=logp_P,
        a=zero_P,
        b=zero_P,
        reference_c=logp_P,
        reference_r=logp_P,
        nll_c=-logp_P,
        tokens_c=tokens_P,
        tokens_r=tokens_P,
        mean_tokens_c=mean_P,
        wpo_weight=None,
    )
    settings = LossConfig(name=[name], label_smoothing=label_smoothing)
    assert settings.beta == default_beta([name]) == (2.0 if name == "simpo" else 0.1)
    # ORPO's likelihood is a mean over each answer's tokens, then over answers.
    n = (-logp_P / tokens_P).mean() if name == "orpo" else -logp_P.sum() / tokens_P.sum()
    return LOSSES[name](pairs, settings).mean().item(), n.item()


@pytest.mark.parametrize("name", RULES)
def test_stated_values_at_zero_margin_are_what_the_losses_return(name: str) -> None:
    adds_n, stated = stated_at_zero_margin()[name]
    value, n = at_zero_margin(name, 0.1 if "label_smoothing" in RULES[name].takes else 0.0)
    assert value == pytest.approx(stated + adds_n * n, abs=5e-5)


def test_first_loss_of_exo_at_the_smoothing_its_paper_advises() -> None:
    assert f"first loss is then {at_zero_margin('exo_pair', 0.001)[0]:.4f}" in explain("exo_pair")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("eval_rewards/margins", "`rewards/margins`"),
        ("eval_loss", "`loss`"),
        ("loss.beta", "`beta`"),
        ("SimPO", "`simpo`"),
        ("aot_pair", "`aot_unpaired`"),
        ("perplexity", "`perplexity/chosen`"),
        ("modifiers", "Modifiers"),
    ],
)
def test_other_ways_to_write_a_name(name: str, found: str) -> None:
    assert found in heading(name)


def test_a_part_of_a_name_finds_all_that_have_it() -> None:
    assert [line for line in explain("margins").splitlines() if line.startswith("#")] == ["### `rewards/margins`"]
    assert explain("eval_logps").count("### ") == 2


def test_a_section_ends_where_the_next_begins() -> None:
    assert explain("kl").count("#") == 3 and "`mean_token_accuracy`" not in explain("kl")
    assert "### `aot`" in explain("losses") and "### `wpo`" not in explain("losses")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'simpl'.*'simpo'"):
        explain("simpl")
    with pytest.raises(ConfigError, match="'xyzzyq'[^?]*whole page"):
        explain("xyzzyq")


def test_the_page_can_be_read_without_a_renderer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120 and "$" not in text and "\\" not in text


def test_command_line(tmp_path: Path) -> None:
    whole = qdpo("metrics", cwd=tmp_path)
    assert whole.returncode == 0 and whole.stdout.strip() == PAGE.read_text(encoding="utf-8").strip()
    one = qdpo("metrics", "rewards/margins", cwd=tmp_path)
    assert one.returncode == 0 and one.stdout.strip() == explain("rewards/margins")
    unknown = qdpo("metrics", "rewards/margin", cwd=tmp_path)
    assert unknown.returncode == 2 and "'rewards/margins'" in unknown.stderr and not unknown.stdout


def test_on_a_terminal_the_page_is_rendered(tmp_path: Path) -> None:
    shown = qdpo("metrics", "beta", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm")
    assert shown.returncode == 0 and "\x1b[" in shown.stdout and "##" not in shown.stdout and "β" in shown.stdout


def test_no_torch_is_loaded() -> None:
    code = "import sys, qdpo.report.screen.explain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
