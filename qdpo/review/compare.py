"""Compares base and tuned model on the same prompts: answers, their log-probs under both models, and the KL.

N response tokens of a row.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdpo.data import stored
from qdpo.data.tokens.pack import PairRow, pack_rows
from qdpo.data.tokens.prompts_only import encode_prompts, read_prompts
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import DataError
from qdpo.families.config_fields import positions_of
from qdpo.model.fast.divergence import token_kl
from qdpo.model.fast.logps import response_logps
from qdpo.model.generate.generate import complete, end_tokens
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.forward import response_hidden
from qdpo.review.open import Reopened, reopen, tuned
from qdpo.run.watcher import Watcher
from qdpo.train.step.feed import row_tensors
from qdpo.train.watch.samples import repetition

# The measures whose means and medians are in the summary.
MEASURES = ("tokens", "repeated", "base_logp", "tuned_logp")


@dataclass(frozen=True)
class CompletionParameters:
    """Parameters of the answers' generation; greedy at temperature 0."""

    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class MeasuredAnswer:
    """One model's answer. Log-probs are means per token, in nats."""

    text: str
    tokens: int
    """Number of tokens, including the end token."""
    ended: bool
    """False if the answer was cut at max_new_tokens."""
    repeated: float
    """Share of its 4-grams of tokens that occur earlier in it."""
    base_logp: float
    tuned_logp: float


@dataclass(frozen=True)
class Compared:
    """Both answers to a prompt, and KL(tuned ‖ base) along the tuned answer, in nats."""

    prompt: str
    base: MeasuredAnswer
    tuned: MeasuredAnswer
    changed: bool
    kl_per_token: float
    kl: float
    """Summed over the answer's tokens."""


@dataclass(frozen=True)
class Middle:
    """Mean and median of numbers."""

    mean: float
    median: float


@dataclass(frozen=True)
class SideSummary:
    """One model's answers: each of MEASURES, and the share of answers cut at the length limit."""

    measures: dict[str, Middle]
    cut: float


@dataclass(frozen=True)
class ComparisonSummary:
    """All answers of a comparison. KL in nats."""

    base: SideSummary
    tuned: SideSummary
    changed: float
    kl_per_token: Middle
    kl: Middle

    def to_json(self) -> dict[str, object]:
        """Plain values as --json prints them, with the measures next to `cut`."""
        sides = {
            name: {**{key: asdict(middle) for key, middle in side.measures.items()}, "cut": side.cut}
            for name, side in (("base", self.base), ("tuned", self.tuned))
        }
        kl = {"kl_per_token": asdict(self.kl_per_token), "kl": asdict(self.kl)}
        return {**sides, "changed": self.changed, **kl}


@dataclass(frozen=True)
class Comparison:
    """All prompts of `source`, answered by the base and by the tuned model of `run`."""

    run: str
    source: str
    drawing: CompletionParameters
    prompts: list[Compared]

    def summary(self) -> ComparisonSummary:
        """Means and medians over the answers, and the share of answers that changed."""
        return ComparisonSummary(
            base=_summed([one.base for one in self.prompts]),
            tuned=_summed([one.tuned for one in self.prompts]),
            changed=statistics.fmean(one.changed for one in self.prompts),
            kl_per_token=_middle([one.kl_per_token for one in self.prompts]),
            kl=_middle([one.kl for one in self.prompts]),
        )

    def to_json(self) -> dict[str, object]:
        """Everything, as plain values."""
        return {**asdict(self), "summary": self.summary().to_json()}


def compare_run(
    folder: Path,
    arguments: list[str],
    watcher: Watcher,
    *,
    prompts: Path | None,
    count: int,
    drawing: CompletionParameters,
) -> Comparison:
    """Compare both models on the first `count` prompts of a file, or of the run's held-out pairs.

    Raises: ConfigError if `folder` is not a finished run; DataError for prompts that cannot be used.
    """
    opened = reopen(folder, arguments, watcher)
    policy, tokenizer = tuned(opened, watcher)
    source, ids = _prompts(opened, tokenizer, prompts, count)
    found = compare(policy, tokenizer, ids, drawing, watcher, tokens_per_row=opened.tokens_per_row)
    return Comparison(str(folder), source, drawing, found)


def _prompts(opened: Reopened, tokenizer: Any, path: Path | None, count: int) -> tuple[str, list[list[int]]]:
    if path is None:
        pairs = stored.load(opened.run)[1]
        ids = list({pair.prompt.tobytes(): pair.prompt.tolist() for pair in pairs}.values())[:count]
        return "the run's held-out pairs", ids
    data, read = opened.config.data, read_prompts(path)[:count]
    ids = encode_prompts(read, tokenizer, data)
    limit = positions_of(opened.place.folder)
    for prompt, tokens in zip(read, ids, strict=True):
        if limit is not None and len(tokens) >= limit.count:
            raise DataError(
                f"The prompt in {prompt.origin} has {len(tokens)} tokens, and the model has {limit.count:,} positions "
                "for prompt and answer. Shorten the prompt."
            )
        if len(tokens) >= data.max_tokens:
            raise DataError(
                f"The prompt in {prompt.origin} has {len(tokens)} tokens, but the run was trained on at most "
                f"{data.max_tokens} tokens of prompt and answer (data.max_tokens). Shorten the prompt."
            )
    return str(path), ids


def compare(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    drawing: CompletionParameters,
    watcher: Watcher,
    *,
    tokens_per_row: int = 0,
) -> list[Compared]:
    """Generate answers with base and tuned model, then score both with both models, `tokens_per_row` tokens a row."""
    watcher.begin("answering", 2 * len(prompts), "answer")
    with policy.reference():
        before = complete(policy.peft, tokenizer, prompts, **asdict(drawing))
    watcher.advance(len(prompts))
    after = complete(policy.peft, tokenizer, prompts, **asdict(drawing))
    watcher.finish()
    pairs = [
        TokenPair(np.array(prompt, np.int32), np.array(old, np.int32), np.array(new, np.int32), number)
        for number, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True))
    ]
    ends, found = set(end_tokens(policy.peft, tokenizer)), {}
    watcher.begin("scoring both answers by both models", len(pairs), "prompt")
    for row in pack_rows(pairs, tokens_per_row):
        for pair, scores in zip(row.pairs, _scores(policy, row), strict=True):
            found[pair.row] = _compared(tokenizer, pair, scores, ends)
        watcher.advance(len(row.pairs))
    watcher.finish()
    return [found[number] for number in range(len(pairs))]


@dataclass(frozen=True)
class _Scores:
    """Scores of a pair of the base's answer (as chosen) and the tuned answer (as rejected).

    Log-probs are by (answer, model).
    """

    logps: dict[tuple[str, str], np.ndarray]
    kl: np.ndarray


def _scores(policy: Policy, row: PairRow) -> list[_Scores]:
    """Both models' scores of a row: one forward pass each, with each prompt once for both answers."""
    tensors = row_tensors(row, policy.device)
    layout = (tensors.token_T, tensors.position_T, tensors.source_N, tensors.spans)
    with torch.no_grad():
        tuned_ND = response_hidden(policy, *layout)
        with policy.reference():
            base_ND = response_hidden(policy, *layout)
        logps = {
            name: response_logps(
                hidden_ND, tensors.label_N, policy.head, tile_mib=policy.tile_mib, metrics=False
            ).logp.cpu()
            for name, hidden_ND in (("base", base_ND), ("tuned", tuned_ND))
        }
        is_tuned_N = torch.from_numpy(row.sequence_N % 2 == 1).to(policy.device)
        kl = token_kl(tuned_ND[is_tuned_N], base_ND[is_tuned_N], policy.head, tile_mib=policy.tile_mib).cpu()
    by_answer = {name: torch.split(logp_N, row.lengths) for name, logp_N in logps.items()}
    kls = torch.split(kl, row.lengths[1::2])
    return [
        _Scores(
            {
                (answer, model): by_answer[model][2 * place + side].numpy()
                for side, answer in enumerate(("base", "tuned"))
                for model in ("base", "tuned")
            },
            kls[place].numpy(),
        )
        for place in range(len(row.pairs))
    ]


def _compared(tokenizer: Any, pair: TokenPair, scores: _Scores, ends: set[int]) -> Compared:
    def answer(name: str, ids: list[int]) -> MeasuredAnswer:
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        logps = [float(scores.logps[name, model].mean(dtype=np.float64)) for model in ("base", "tuned")]
        return MeasuredAnswer(text, len(ids), ids[-1] in ends, repetition(ids), *logps)

    old, new = pair.chosen.tolist(), pair.rejected.tolist()
    return Compared(
        str(tokenizer.decode(pair.prompt)), answer("base", old), answer("tuned", new), old != new,
        float(scores.kl.mean(dtype=np.float64)), float(scores.kl.sum(dtype=np.float64)),
    )  # fmt: skip


def _middle(values: Sequence[float]) -> Middle:
    return Middle(mean=statistics.fmean(values), median=statistics.median(values))


def _summed(answers: list[MeasuredAnswer]) -> SideSummary:
    measures = {name: _middle([getattr(answer, name) for answer in answers]) for name in MEASURES}
    return SideSummary(measures=measures, cut=sum(not answer.ended for answer in answers) / len(answers))
