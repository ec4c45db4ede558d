"""Lengths that a plan finds in a file, against those of qdpo's own preparation."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from qdpo.data.prepare import prepare_data, read_pairs
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import DataError
from qdpo.forecast import lengths
from qdpo.forecast.lengths import Known
from qdpo.settings import layered
from qdpo.settings.schema import RunConfig
from tests.conftest import NOUNS, Quiet, tiny_rows, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and no model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(model: Path, rows: list[dict[str, Any]], tmp_path: Path, **changes: str) -> RunConfig:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    changes = {"data__template": "plain", **changes}
    words = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return layered.resolve([f"model.path={model}", f"data.path={path}", *words]).config


def both(model: Path, rows: list[dict[str, Any]], tmp_path: Path, **changes: str) -> tuple[Known, list[TokenPair]]:
    """What the plan samples, and the pairs that a run would prepare."""
    config = config_of(model, rows, tmp_path, **changes)
    _name, pairs = read_pairs(config.data, tiny_tokenizer(), Quiet())
    return lengths.sampled(config, model / "tokenizer.json"), pairs


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(NOUNS, k=count))


def mean(pairs: list[TokenPair]) -> float:
    return sum(pair.tokens for pair in pairs) / len(pairs)


def test_a_sample_of_all_rows_finds_the_prepared_lengths(model: Path, tmp_path: Path) -> None:
    known, pairs = both(model, tiny_rows(200), tmp_path)
    longest = max(pairs, key=lambda pair: pair.tokens)
    assert known.lengths.longest == longest.tokens
    assert known.lengths.mean == pytest.approx(mean(pairs))
    assert known.lengths.mean_prompt == pytest.approx(sum(len(pair.prompt) for pair in pairs) / len(pairs))
    assert "sampled: 200 of 200" in known.how and str(model / "tokenizer.json") in known.how
    assert "template" not in known.how


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
def test_a_chat_template_is_allowed_for(model: Path, tmp_path: Path, is_chat: bool) -> None:
    """A template puts roles around plain text too."""
    rows: list[dict[str, Any]] = list(tiny_rows(50))
    if is_chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    known, pairs = both(model, rows, tmp_path, data__template="auto")
    assert mean(pairs) - 5 <= known.lengths.mean <= mean(pairs) + 5
    assert "6 tokens a turn added for the chat template" in known.how


def test_rows_in_order_of_length_are_sampled_to_the_last(model: Path, tmp_path: Path) -> None:
    """1,999 rows: the first thousand are no sample."""
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b" * (1 + n // 20)} for n in range(1999)]
    known, pairs = both(model, rows, tmp_path)
    assert known.lengths.mean == pytest.approx(mean(pairs), rel=0.05)


@pytest.mark.parametrize("short", ["words", "bytes"])
def test_one_long_row_among_thousands_is_found(model: Path, tmp_path: Path, short: str) -> None:
    """Also where its tokens are so much longer than those of other rows that its characters promise too many."""
    rows: list[dict[str, Any]] = list(tiny_rows(3000))
    if short == "bytes":
        rows = [{"prompt": f"{n:04}", "chosen": "\x01", "rejected": "\x02" * (n % 40 + 1)} for n in range(3000)]
    rows[777]["rejected"] = words(600)
    known, pairs = both(model, rows, tmp_path, data__max_tokens="1000")
    assert known.lengths.longest == max(pair.tokens for pair in pairs) > 500
    assert known.lengths.mean < 60 and "sampled: 1000 of 3000" in known.how


def test_the_longest_is_what_the_length_rule_leaves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3,000 rows 200 are so long that they are dropped; the longest that stays is neither of these nor sampled."""
    monkeypatch.setattr(lengths, "SAMPLE", 100)
    rows: list[dict[str, Any]] = list(tiny_rows(3000))
    for number in range(200):
        rows[number * 5]["rejected"] = words(400, number)
    rows[777] |= {"chosen": words(120), "rejected": words(120, 1)}  # cut, but not by half
    known, pairs = both(model, rows, tmp_path, data__max_tokens="100")
    assert len(pairs) == 2800
    assert known.lengths.longest == max(pair.tokens for pair in pairs) > 170
    assert known.pairs == pytest.approx(len(pairs) - 140, rel=0.05)


def test_cuts_and_drops_are_those_of_the_length_rule(model: Path, tmp_path: Path) -> None:
    """One byte is one token here; every combination of prompt and answer around the limits."""
    sizes = itertools.product(
        (4, 40, 59, 60, 61, 69, 70, 98, 99, 100, 120), (1, 20, 30, 38, 39, 40, 41, 79, 80, 300), (2, 31, 78, 81)
    )
    rows = [
        {"prompt": f"{number:03}" + "\x01" * (prompt - 3), "chosen": "\x02" * chosen, "rejected": "\x03" * rejected}
        for number, (prompt, chosen, rejected) in enumerate(sizes)
    ]
    for limits in ({}, {"data__max_prompt_tokens": "60"}):
        known, pairs = both(model, rows, tmp_path, data__max_tokens="100", **limits)
        assert 0 < len(pairs) < len(rows)
        assert known.lengths.longest == max(pair.tokens for pair in pairs)
        assert known.lengths.mean == pytest.approx(mean(pairs))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"data__eval_limit": "7"}, {"data__eval_fraction": "0.2"}, {"data__limit": "60"},
        {"data__max_tokens": "100", "data__limit": "170", "data__max_drop_fraction": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_the_number_of_training_pairs_is_that_of_the_split(
    model: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    """A fifth of the rows is too long for 100 tokens."""
    rows: list[dict[str, Any]] = list(tiny_rows(400))
    for row in rows[::5]:
        row["rejected"] = "\x01" * 300
    config = config_of(model, rows, tmp_path, **changes)
    run = prepare_data(config.data, tiny_tokenizer(), seed=0, watcher=Quiet())
    known = lengths.sampled(config, model / "tokenizer.json")
    assert known.pairs == len(run.train)


def test_without_a_tokenizer_characters_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 40, "chosen": "c" * 80, "rejected": f"{number:0400}"} for number in range(10)]
    known = lengths.sampled(config_of(model, rows, tmp_path), None)
    assert known.lengths.longest == known.lengths.mean == 10 + 20 + 100 + 2  # each answer has an end token
    assert known.lengths.longest_prompt == 10
    assert "as 4 characters a token: no tokenizer here" in known.how


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, r"pairs.jsonl is empty"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2, {}, r"No usable pair in .*all 2 rows"),
        ([{"prompt": "p" * 900, "chosen": "a", "rejected": "b"}], {"data__max_tokens": "50"}, "data.max_tokens=50"),
    ],
    ids=["empty", "unusable", "too long"],
)
def test_data_without_a_pair_is_refused(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lengths.sampled(config_of(model, rows, tmp_path, **changes), None)
