"""Makes the judge that `--by` names, with its options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qdpo.collect.candidates import Candidates
from qdpo.collect.judge.run import Judge
from qdpo.errors import ConfigError, DiskError
from qdpo.run import disk

MOST_RUBRIC_BYTES = 2**20
KINDS = "length[:shorter|longer], regex:[!]PATTERN, reward-model:PATH, openai:URL"


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The options next to --by; None means the judge's own default."""

    margin: float | None = None
    quantization: str | None = None
    device: str | None = None
    judge_model: str | None = None
    rubric: Path | None = None
    parallel: int | None = None
    timeout: float | None = None
    max_tokens: int | None = None


BELONGS = {
    "length": {"margin"},
    "regex": set[str](),
    "reward-model": {"margin", "quantization", "device"},
    "openai": {"judge_model", "rubric", "parallel", "timeout", "max_tokens"},
}
"""The options that each kind of judge takes."""


def make_judge(by: str, options: JudgeOptions, items: Sequence[Candidates], say: Callable[[str], None]) -> Judge:
    """Make the judge. Raises: ConfigError for an unknown judge, or an option that the judge does not take."""
    kind, _, rest = by.partition(":")
    if kind not in BELONGS:
        raise ConfigError(f"--by {by} is not a judge. Choose from: {KINDS}.")
    given = {field.name for field in fields(options) if getattr(options, field.name) is not None}
    if odd := sorted(given - BELONGS[kind]):
        raise ConfigError(f"--{odd[0].replace('_', '-')} has no effect with --by {kind}. Leave it out.")
    if kind == "length":
        return _length(rest or "shorter", options, items)
    if not rest:
        raise ConfigError(f"--by {by} lacks the part after the colon. Choose from: {KINDS}.")
    if kind == "regex":
        from qdpo.collect.judge.rules import RegexJudge

        return RegexJudge(rest)
    return _openai(rest, options, say) if kind == "openai" else _reward(rest, options, say)


def _length(direction: str, options: JudgeOptions, items: Sequence[Candidates]) -> Judge:
    from qdpo.collect.judge.rules import LengthJudge

    if direction not in ("shorter", "longer"):
        raise ConfigError(f"--by length:{direction} is neither length:shorter nor length:longer.")
    margin = 0.1 if options.margin is None else options.margin
    if not 0 <= margin < 1:
        raise ConfigError(f"--margin {margin:g} is not a share of a length. Give a number from 0 to below 1.")
    return LengthJudge(items, "longer" if direction == "longer" else "shorter", margin)


def _reward(path: str, options: JudgeOptions, say: Callable[[str], None]) -> Judge:
    from qdpo.collect.judge.reward_model import reward_judge

    quantization, device = options.quantization or "nf4", options.device or "auto"
    for name, value, known in (
        ("quantization", quantization, ("nf4", "fp4", "none")),
        ("device", device, ("auto", "cuda", "cpu")),
    ):
        if value not in known:
            raise ConfigError(f"--{name} {value} is not one of {', '.join(known)}.")
    return reward_judge(path, quantization=quantization, device=device, margin=options.margin or 0.0, say=say)


def _openai(url: str, options: JudgeOptions, say: Callable[[str], None]) -> Judge:
    from qdpo.collect.judge.pairwise import RUBRIC, PairwiseJudge
    from qdpo.collect.judge.server import Server, endpoint

    where = endpoint(url)
    if not options.judge_model:
        raise ConfigError("--by openai:URL needs --judge-model NAME, the model's name on the server.")
    rubric = RUBRIC if options.rubric is None else _read(options.rubric)
    server = Server(where, options.judge_model, timeout_s=options.timeout or 120, max_tokens=options.max_tokens or 2048)
    server.say = say
    return PairwiseJudge(server, rubric=rubric, parallel=options.parallel or 4)


def _read(rubric: Path) -> str:
    try:
        if rubric.stat().st_size > MOST_RUBRIC_BYTES:
            raise ConfigError(f"--rubric {rubric} is larger than {MOST_RUBRIC_BYTES:,} bytes. Is it the right file?")
        text = disk.read_bytes(rubric).decode("utf-8-sig").strip()
    except (OSError, DiskError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rubric {rubric} cannot be read: {error}") from None
    if not text:
        raise ConfigError(f"--rubric {rubric} is empty. Leave it out to use qdpo's own rubric.")
    return text
