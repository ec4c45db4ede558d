"""How long the pairs of a run are: as prepared, from a sample of the data, or assumed from the settings; no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdpo.choice import Lengths
from qdpo.config import RunConfig
from qdpo.data import pair, source, tokens
from qdpo.data.pair import Pair
from qdpo.errors import DataError
from qdpo.presets import shipped_folder
from qdpo.rundir import RunDir

SAMPLE = 1000
"""Rows that are tokenised, and as many of the longest by characters."""
CHARACTERS = 4.0
"""Characters of a token where no tokenizer is at hand: English text, roughly."""
TURN_TOKENS = 6
"""Tokens that a chat template puts around a turn, roughly."""

Count = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Known:
    """Lengths, the number of training pairs if it is known, and how that was found, for the user to read."""

    lengths: Lengths
    pairs: int | None
    how: str


def prepared(run: RunDir, config: RunConfig) -> Known | None:
    """Exact lengths of a run that has prepared its pairs, else None."""
    if not run.train_pairs.is_file():
        return None
    train, held_out = tokens.load_pairs(run.train_pairs), tokens.load_pairs(run.held_out_pairs)
    sizes = [(len(p.prompt), p.tokens) for p in train + held_out]
    return Known(_lengths(sizes, config), len(train), f"exact: the pairs that {run.path} has prepared")


def assumed(config: RunConfig) -> Known:
    """The longest pair that data.max_tokens allows: two answers of that length to a prompt of next to nothing."""
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
    opened = source.open_source(
        str(config.data.path), split=config.data.split, revision=config.data.revision, shipped=shipped_folder()
    )
    columns = {name: value for name, value in config.data.columns.model_dump().items() if value is not None}
    layout = pair.detect_layout(opened.rows, columns, opened.name)
    found = [pair.to_pair(row, number, layout) for number, row in enumerate(opened.rows, 1)]
    usable = [p for p in found if isinstance(p, Pair)]
    if not usable:
        raise DataError(f"No usable pair in {opened.name}: all {len(found)} rows would be dropped.")
    usable = usable[: config.data.limit]
    step = max(1, len(usable) // SAMPLE)
    by_size = sorted(usable, key=lambda p: -_characters(p))
    sample, longest = usable[::step][:SAMPLE], by_size[: min(SAMPLE, max(20, len(usable) // 50))]
    sizes = [_size(row, config) for row in _counted([*sample, *longest], _counter(tokenizer_file))]
    lengths = _lengths([size for size in sizes[: len(sample)] if size], config)
    top = max((size for size in sizes if size), key=lambda size: size[1])
    lengths = Lengths(
        max(top[1], lengths.longest), top[0], lengths.mean, lengths.mean_prompt, config.train.pairs_per_step
    )
    with_what = (
        f"with {tokenizer_file}" if tokenizer_file else f"as {CHARACTERS:g} characters a token: no tokenizer here"
    )
    held_out = 0 if config.data.eval_path or config.data.eval_split else config.data.eval_fraction
    how = (
        f"sampled: {len(sample)} of {len(usable)} usable pairs of {opened.name} and the longest ones, counted "
        f"{with_what}, {TURN_TOKENS} tokens a turn added for the chat template"
    )
    return Known(lengths, round(len(usable) * (1 - held_out)), how)


def _characters(p: Pair) -> int:
    return sum(len(turn["content"]) for turn in p.prompt) + len(p.chosen) + len(p.rejected)


def _counter(tokenizer_file: Path | None) -> Count:
    if tokenizer_file is None:
        return lambda texts: [round(len(text) / CHARACTERS) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return lambda texts: [len(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _counted(pairs: Sequence[Pair], count: Count) -> list[tuple[int, int, int]]:
    texts = [text for p in pairs for text in ("\n".join(t["content"] for t in p.prompt), p.chosen, p.rejected)]
    numbers = iter(count(texts))
    extra = [TURN_TOKENS * len(p.prompt) if p.is_chat else 0 for p in pairs]
    return [(next(numbers) + more, next(numbers) + 1, next(numbers) + 1) for more in extra]


def _size(counted: tuple[int, int, int], config: RunConfig) -> tuple[int, int] | None:
    """Tokens of the prompt and of the pair after the length rule; None if the pair would be dropped."""
    prompt, *answers = counted
    most = config.data.max_tokens
    if prompt > min(config.data.max_prompt_tokens or most, most - tokens.MIN_KEPT_TOKENS):
        return None
    return prompt, prompt + sum(min(answer, most - prompt) for answer in answers)


def _lengths(sizes: Sequence[tuple[int, int]], config: RunConfig) -> Lengths:
    if not sizes:
        raise DataError(f"No pair is within data.max_tokens={config.data.max_tokens}. Raise it.")
    prompts, whole = (np.array(part) for part in zip(*sizes, strict=True))
    top: Any = int(whole.argmax())
    return Lengths(
        int(whole[top]), int(prompts[top]), float(whole.mean()), float(prompts.mean()), config.train.pairs_per_step
    )
