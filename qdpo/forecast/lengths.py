"""The lengths of a run's pairs: as prepared, from a sample of the data, or assumed from the settings; no torch.

What reads pairs imports numpy and jinja2, so it is imported where pairs are read: a plan of assumed lengths is not.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from qdpo.errors import DataError
from qdpo.forecast.choose import Lengths
from qdpo.run.folder import RunDir
from qdpo.settings.layered import shipped_folder
from qdpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from qdpo.data.layouts.pair import Pair

SAMPLE = 1000
"""Rows to tokenise, plus at most twice as many of the longest."""
CHARACTERS = 4.0
"""Characters per token when there is no tokenizer: English text, roughly."""
TURN_TOKENS = 6
"""Tokens that a chat template adds to a turn, roughly."""

CountTokens = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Known:
    """Lengths, the number of training pairs if known, and their source, as text for the user."""

    lengths: Lengths
    pairs: int | None
    how: str


def prepared(run: RunDir, config: RunConfig) -> Known | None:
    """Exact lengths if the run has prepared its pairs, else None."""
    if not run.train_pairs.is_file():
        return None
    from qdpo.data.tokens import sieve

    train, held_out = sieve.load_pairs(run.train_pairs), sieve.load_pairs(run.held_out_pairs)
    sizes = [(len(p.prompt), p.tokens) for p in [*train, *held_out]]
    return Known(_lengths(sizes, config), len(train), f"exact: the pairs that {run.path} has prepared")


def assumed(config: RunConfig) -> Known:
    """The longest pair that data.max_tokens allows: two answers of that length to an almost empty prompt."""
    longest = 2 * config.data.max_tokens
    lengths = Lengths(longest, 0, longest / 4, longest / 12, config.train.pairs_per_step)
    how = (
        f"assumed: pairs up to {longest:,} tokens (prompt and both answers, at data.max_tokens="
        f"{config.data.max_tokens}), a quarter of that on average; data.path=FILE counts yours"
    )
    return Known(lengths, config.data.limit, how)


def sampled(config: RunConfig, tokenizer_file: Path | None) -> Known:
    """Lengths from a sample of data.path and its longest rows.

    Raises: DataError if the data has no usable pair.
    """
    from qdpo.data.layouts import pair
    from qdpo.data.read import source

    usable: list[Pair] = []
    seen, name = 0, str(config.data.path)
    for path in source.split_paths(name):
        opened = source.open_source(
            path, split=config.data.split, revision=config.data.revision, shipped=shipped_folder(),
            skip_bad=config.data.skip_bad_lines, row_bytes=round(config.data.max_row_mib * 2**20),
        )  # fmt: skip
        columns = {role: value for role, value in config.data.columns.model_dump().items() if value is not None}
        layout = pair.detect_layout(
            opened.rows.read_sample(), columns, opened.name, form=config.data.format,
            last_answer_only=config.data.last_answer_only,
        )  # fmt: skip
        for row in opened.rows:
            seen += 1
            usable += [found for found in pair.to_pairs(row, seen, layout) if isinstance(found, pair.Pair)]
    if not usable:
        raise DataError(f"No usable pair in {name}: all {seen} rows would be dropped.")
    front = usable[: config.data.limit]
    sample, count = random.Random(0).sample(front, min(SAMPLE, len(front))), _counter(tokenizer_file)
    counted = _counted(sample, count, config)
    kept = [size for row in counted if (size := _size(row, config))]
    lengths = _lengths(kept, config)
    longest = _longest(front, sum(map(_characters, sample)) / sum(map(sum, counted)), config)
    long_sizes = [size for row in _counted(longest, count, config) if (size := _size(row, config))]
    top = max(kept + long_sizes, key=lambda size: size[1])
    lengths = replace(lengths, longest=top[1], longest_prompt=top[0])
    pairs = min(round(len(usable) * len(kept) / len(sample)), config.data.limit or len(usable))
    if not (config.data.eval_path or config.data.eval_split):
        pairs -= min(max(1, round(pairs * config.data.eval_fraction)), config.data.eval_limit)
    with_what = (
        f"with {tokenizer_file}" if tokenizer_file else f"as {CHARACTERS:g} characters a token: no tokenizer here"
    )
    template = f", {TURN_TOKENS} tokens a turn added for the chat template" if config.data.template == "auto" else ""
    how = (
        f"sampled: {len(sample)} of {len(front)} usable pairs of {name} and the longest ones, counted "
        f"{with_what}{template}"
    )
    return Known(lengths, pairs, how)


def _longest(pairs: "Sequence[Pair]", per_token: float, config: RunConfig) -> "list[Pair]":
    """The longest pairs by characters, and those that look the longest once the length rule has cut and dropped."""
    most = min(SAMPLE, max(20, len(pairs) // 50))
    counted = _counted(pairs, lambda texts: [round(len(text) / per_token) for text in texts], config)
    left = [(_size(row, config) or (0, 0))[1] for row in counted]
    after = heapq.nlargest(most, range(len(pairs)), key=left.__getitem__)
    return heapq.nlargest(most, pairs, key=_characters) + [pairs[index] for index in after]


def _characters(p: "Pair") -> int:
    return sum(len(turn["content"]) for turn in p.prompt) + len(p.chosen) + len(p.rejected)


def _counter(tokenizer_file: Path | None) -> CountTokens:
    if tokenizer_file is None:
        return lambda texts: [round(len(text) / CHARACTERS) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return lambda texts: [len(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _counted(pairs: "Sequence[Pair]", count: CountTokens, config: RunConfig) -> list[tuple[int, int, int]]:
    texts = [text for p in pairs for text in ("\n".join(t["content"] for t in p.prompt), p.chosen, p.rejected)]
    numbers = iter(count(texts))
    # A chat template puts roles around plain text as well; without one, `Human:` and `Assistant:` stand in a chat.
    extra = [TURN_TOKENS * len(p.prompt) if p.is_chat or config.data.template == "auto" else 0 for p in pairs]
    return [(next(numbers) + more, next(numbers) + 1, next(numbers) + 1) for more in extra]


def _size(counted: tuple[int, int, int], config: RunConfig) -> tuple[int, int] | None:
    """Tokens of the prompt and of the pair after the length rule of `data.tokens`; None if it drops the pair."""
    from qdpo.data.tokens.cut import Limits

    prompt, *answers = counted
    limits = Limits(config.data.max_tokens, config.data.max_prompt_tokens or config.data.max_tokens)
    if limits.outcome(*counted) not in ("whole", "cut"):
        return None
    room = config.data.max_tokens - prompt
    return prompt, prompt + sum(min(answer, room) for answer in answers)


def _lengths(sizes: Sequence[tuple[int, int]], config: RunConfig) -> Lengths:
    if not sizes:
        raise DataError(f"No pair is within data.max_tokens={config.data.max_tokens}. Raise it.")
    prompt, whole = max(sizes, key=lambda size: size[1])
    mean_prompt, mean = (fmean(part) for part in zip(*sizes, strict=True))
    return Lengths(whole, prompt, mean, mean_prompt, config.train.pairs_per_step)
