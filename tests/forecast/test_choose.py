"""What a limit lets a run have, and what is said when nothing fits."""

from dataclasses import replace
from typing import Any

import pytest

from qdpo.families.shapes import known_shape
from qdpo.forecast import choose, memory
from qdpo.forecast.choose import Choice, Given, Lengths
from qdpo.forecast.memory import GIB, MemorySettings, RowSize

LLAMA, QWEN = known_shape("meta-llama/Llama-2-7b-hf"), known_shape("Qwen/Qwen2.5-14B")
LENGTHS = Lengths(longest=1500, longest_prompt=500, mean=750, mean_prompt=300, pairs_per_step=16)


def pick(limit: float, lengths: Lengths = LENGTHS, run: MemorySettings | None = None, **given: Any) -> Choice:
    return choose.choose(LLAMA, run or MemorySettings(), lengths, Given(**given), limit=limit * GIB)


def test_more_memory_is_never_slower() -> None:
    limits = (6.5, 8, 10, 12, 16, 24)
    found = [pick(limit) for limit in limits]
    assert all(one.peak <= limit * GIB for one, limit in zip(found, limits, strict=True))
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 1.2 * seconds[-1]
    assert found[0].run.kept_layers < 20 and found[-1].run.kept_layers == 32
    assert all(one.tokens_per_row >= 1500 for one in found)


def test_the_number_of_kept_layers_is_the_largest_that_fits() -> None:
    found = pick(9)
    assert 0 < found.run.kept_layers < 32
    more = replace(found.run, kept_layers=found.run.kept_layers + 1)
    assert memory.peak(LLAMA, found.run, found.row) <= 9 * GIB < memory.peak(LLAMA, more, found.row)


def test_what_is_given_stays() -> None:
    fixed = pick(24, rows=2048, kept=3, offload=True, host_embeddings=True)
    assert (fixed.tokens_per_row, fixed.run.kept_layers, fixed.run.offload) == (2048, 3, True)
    assert fixed.run.host_embeddings
    assert pick(24, rows=0).row.tokens == 1500  # a pair a row: the longest
    assert pick(3).peak > 3 * GIB  # nothing fits: the smallest is said


def test_the_table_goes_to_the_host_only_where_it_must() -> None:
    assert not pick(12).run.host_embeddings
    short = Lengths(1000, 400, 500, 200, 16)
    tight = choose.choose(QWEN, MemorySettings(), short, Given(), limit=10.4 * GIB)
    assert tight.run.host_embeddings and tight.peak <= 10.4 * GIB
    tied = replace(QWEN, tied=True)
    assert not choose.choose(tied, MemorySettings(), short, Given(), limit=10 * GIB).run.host_embeddings


def test_little_host_memory_forbids_offload() -> None:
    long = replace(LENGTHS, longest=20_000, longest_prompt=5000)
    assert pick(9, long).run.offload
    there = choose.choose(LLAMA, MemorySettings(), long, Given(), limit=9 * GIB, host_limit=2 * GIB)
    assert not there.run.offload


def test_on_a_cpu_rows_stay_short_and_nothing_is_moved() -> None:
    found = pick(64, run=MemorySettings(cuda=False))
    assert found.tokens_per_row <= 2048 and not found.run.offload and not found.run.host_embeddings


def test_ways_out_fit_and_come_in_order() -> None:
    given = Given(kept=32, offload=False, host_embeddings=False)
    ways = choose.ways_out(LLAMA, MemorySettings(), LENGTHS, given, limit=7 * GIB, max_tokens=1024)
    assert 1 <= len(ways) <= 3 and all(way.peak <= 7 * GIB for way in ways)
    assert ways[0].change == "memory.kept_layers=auto"
    text = choose.advice(ways)
    assert "What fits: memory.kept_layers=auto" in text and "times the time" in text


def test_shorter_pairs_are_a_way_out() -> None:
    long = replace(LENGTHS, longest=40_000, longest_prompt=10_000)
    ways = choose.ways_out(LLAMA, MemorySettings(), long, Given(), limit=8 * GIB, max_tokens=30_000)
    assert ways[0].change.startswith("data.max_tokens=")
    tokens = int(ways[0].change.removeprefix("data.max_tokens=").split()[0])
    assert 1000 < tokens < 30_000


def test_a_limit_below_the_fixed_part_has_no_way_out() -> None:
    assert choose.fixed_part(LLAMA, MemorySettings()) > 3.5 * GIB
    ways = choose.ways_out(LLAMA, MemorySettings(), LENGTHS, Given(), limit=3 * GIB, max_tokens=1024)
    assert ways == [] and "choose a smaller model" in choose.advice(ways)


@pytest.mark.parametrize("budget", [0, 1000, 1500, 2000, 2400, 4096, 8192])
def test_a_row_holds_its_budget_or_the_longest_pair(budget: int) -> None:
    row = LENGTHS.row(budget)
    assert row.tokens == max(budget, 1500) and 0 < row.prompts < row.tokens
    assert isinstance(row, RowSize) and row.pairs >= 1
