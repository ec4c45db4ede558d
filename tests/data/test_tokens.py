import copy
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from qdpo.data.layouts.pair import detect_layout
from qdpo.data.read.files import Place
from qdpo.data.read.source import open_source
from qdpo.data.split import held_out_places
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Preparation, TokenPair, load_pairs, nothing_usable, save_pairs
from qdpo.errors import DataError, DiskError

HH = Path(__file__).parents[3] / "shared/data/hh-harmless-1600.jsonl.gz"


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def run(rows, tokenizer, *, max_tokens=1000, max_prompt_tokens=500, limit=None, progress=None, **rules):
    work = Preparation(tokenizer, Limits(max_tokens, max_prompt_tokens, **rules), Renderer(tokenizer=tokenizer))
    located = [(Place("test data", number), row) for number, row in enumerate(rows, 1)]
    work.add(located, detect_layout(rows, {}, "test data"), limit=limit, progress=progress)
    return work.finish()


def split_held_out(pairs, fraction, limit, seed):
    held = held_out_places(pairs, fraction, limit, seed)
    return [pair for n, pair in enumerate(pairs) if n not in held], [pairs[n] for n in held]


def noted(prepared):
    return [(note.row, note.action, note.reason) for note in prepared.notes]


def random_pairs(seed, count=200, prompts=40):
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return draw.integers(0, 999, draw.integers(low, high)).astype(np.int32)

    pool = [ids(1, 30) for _ in range(prompts)]
    return [TokenPair(pool[draw.integers(prompts)], ids(1, 50), ids(1, 50), n + 1) for n in range(count)]


@pytest.mark.parametrize("which", ["chat_tokenizer", "base_tokenizer", "bos_tokenizer", "spaced_tokenizer"])
def test_property_prompt_ids_are_those_of_inference_and_the_text_comes_back(which, request):
    tokenizer, draw = request.getfixturevalue(which), random.Random(which)
    letters = "the a capital Paris 2 = é \n\n ' Yes".split(" ") + [" ", "\n", "write", "s"]
    rows = [
        row(*("".join(draw.choice(letters) for _ in range(draw.randint(1, 30))) + end for end in ("?", "!", ".")))
        for _ in range(1100)  # more than one batch
    ]
    prepared = run(rows, tokenizer)
    adds_bos = which == "bos_tokenizer"
    for pair in prepared.pairs:
        source = rows[pair.row - 1]
        text = source["prompt"]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        alone = tokenizer(text, add_special_tokens=adds_bos)["input_ids"]
        assert pair.prompt.tolist() == alone
        assert pair.prompt.dtype == pair.chosen.dtype == np.int32
        assert pair.tokens == len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        for side in ("chosen", "rejected"):
            ids = getattr(pair, side).tolist()
            assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
            if which != "spaced_tokenizer":  # knows only the letters it was trained on
                whole = tokenizer.decode(alone[adds_bos:] + ids)
                assert whole == text + source[side] + tokenizer.eos_token


def test_a_response_is_tokenised_in_its_place_without_a_space_of_its_own(spaced_tokenizer):
    (pair,) = run([row("capital of\n", "France", "the sea")], spaced_tokenizer).pairs
    whole = spaced_tokenizer("capital of\nFrance</s>", add_special_tokens=False)["input_ids"]
    assert [*pair.prompt, *pair.chosen] == whole
    assert spaced_tokenizer.decode(whole) == "capital of\nFrance</s>"
    by_itself = spaced_tokenizer("France</s>", add_special_tokens=False)["input_ids"]
    assert pair.chosen.tolist() != by_itself  # that would be "\n France"


@pytest.mark.parametrize("which", ["base_tokenizer", "bos_tokenizer"])
def test_a_token_across_the_border_is_parted_there(which, request):
    tokenizer = request.getfixturevalue(which)
    (pair,) = run(
        [row("keep the ", "sea", "that")], tokenizer
    ).pairs  # " sea" is one token, but the prompt has its space
    assert pair.prompt.tolist() == tokenizer("keep the ")["input_ids"]
    assert [tokenizer.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["sea<|end|>", "that<|end|>"]


def test_a_chat_template_alone_decides_about_bos(bos_tokenizer, chat_tokenizer):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template
    rows = [row("q", "a", "b")]
    assert tokenizer.bos_token_id not in run(rows, tokenizer).pairs[0].prompt
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    assert run(rows, tokenizer).pairs[0].prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert run(rows, tokenizer).pairs[0].chosen[0] != tokenizer.bos_token_id


def test_bos_stands_once_whether_the_text_has_it_or_not(bos_tokenizer):
    prepared = run([row("the", "a", "b"), row("<s>the", "c", "d"), row("<s><s>the", "e", "f")], bos_tokenizer)
    first, *others = (pair.prompt.tolist() for pair in prepared.pairs)
    assert first[0] == bos_tokenizer.bos_token_id and others == [first, first]


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_length_policy(base_tokenizer):
    x = lambda n: "\x01" * n  # noqa: E731  one token each: a byte outside the training text
    assert count(base_tokenizer, x(7)) == 7
    limits = {"max_tokens": 100, "max_prompt_tokens": 60}
    cases = [  # tokens of prompt, chosen, rejected (each answer gains the end token): what happens
        ((10, 89, 20), None),
        ((10, 90, 20), "cut"),
        ((60, 10, 39), None),
        ((61, 10, 20), "prompt_too_long"),
        ((60, 40, 80), "response_cut_too_much"),  # 40 left of 81 tokens: below half
        ((60, 40, 79), "cut"),  # 40 left of 80: just half
        ((10, 20, 180), "response_cut_too_much"),
        ((10, 20, 179), "cut"),
        ((10, 1, 2), None),  # short, but whole
    ]
    for (prompt, chosen, rejected), outcome in cases:
        rows = [row("q", "a", "b"), row(x(prompt), x(chosen), "b" + x(rejected - 1))]
        prepared = run(rows, base_tokenizer, **limits)
        found = [(note.action, note.reason) for note in prepared.notes]
        expected = {None: [], "cut": [("cut", "response_cut")]}.get(outcome, [("dropped", outcome)])
        assert found == expected, (prompt, chosen, rejected)
        if outcome in (None, "cut"):
            pair = prepared.pairs[1]
            assert len(pair.prompt) == prompt
            for side, length in ((pair.chosen, chosen + 1), (pair.rejected, rejected + 1)):
                assert len(side) == min(length, 100 - prompt)
                assert (side[-1] == base_tokenizer.eos_token_id) == (length <= 100 - prompt)
    none = run([row(x(50), "a", "b")], base_tokenizer, max_tokens=50, max_prompt_tokens=60)
    assert len(none.pairs) == 0
    message = r"None of the 1 rows can be used \(prompt_too_long 1\).*data\.max_prompt_tokens"
    assert re.match(message, str(nothing_usable(none)))
    few = run(
        [row("q", "a", "b"), row(x(70), x(31), "b" + x(39))], base_tokenizer, max_tokens=101, max_prompt_tokens=70
    )
    assert noted(few) == [(2, "dropped", "response_cut_too_much")]  # 31 left of 40: more than half, but fewer than 32


def test_cut_notes_name_sides_and_lengths(base_tokenizer):
    rows = [row("q", "\x01" * 60, "\x02" * 70)]
    (note,) = run(rows, base_tokenizer, max_tokens=51).notes
    assert (note.row, note.detail) == (1, "chosen from 61 to 50 tokens; rejected from 71 to 50 tokens")


def test_pairs_that_become_equal_are_dropped(base_tokenizer):
    rows = [row("q", "a", "b"), row("q", "\x01" * 60, "\x01" * 61)]
    assert noted(run(rows, base_tokenizer, max_tokens=51)) == [(2, "dropped", "identical_after_cut")]


def test_duplicates_and_contradictions(base_tokenizer):
    rows = [
        row("p", "a", "b"),  # 1: kept
        row("q", "a", "b"),  # 2: contradicted by 4
        row("p", "a", "b"),  # 3: duplicate of 1
        row("q", "b", "a"),  # 4
        row("q", "a", "b"),  # 5: nor is it better a third time
        row("p", "a", "c"),  # 6: same prompt, another pair
    ]
    prepared = run(rows, base_tokenizer)
    assert [pair.row for pair in prepared.pairs] == [1, 6]
    contradictions = [(n, "dropped", "contradiction") for n in (2, 4, 5)]
    assert noted(prepared) == sorted([(3, "dropped", "duplicate"), *contradictions])
    assert len(prepared.notes) + len(prepared.pairs) == prepared.seen == 6


def test_a_cut_row_that_is_dropped_in_the_end_is_noted_once(base_tokenizer):
    rows = [row("q", "\x01" * 60, "b")] * 2
    assert noted(run(rows, base_tokenizer, max_tokens=51)) == [(1, "cut", "response_cut"), (2, "dropped", "duplicate")]


def test_what_was_done_to_a_pair_is_noted_whatever_became_of_the_others_of_its_row(base_tokenizer):
    long = " ".join(["seven bright harbours"] * 30)
    rows = [{"prompt": "where", "chosen": long, "rejected": ["no", "no", ""]}]
    prepared = run(rows, base_tokenizer, max_tokens=count(base_tokenizer, long))
    assert [(note.action, note.reason) for note in prepared.notes] == [
        ("cut", "response_cut"), ("dropped", "duplicate"), ("dropped", "empty_response")
    ]  # fmt: skip
    swapped = [*rows, {"prompt": "where", "chosen": "no", "rejected": [long]}]
    prepared = run(swapped, base_tokenizer, max_tokens=count(base_tokenizer, long))
    assert [(note.row, note.reason) for note in prepared.notes] == [
        (1, "contradiction"), (1, "duplicate"), (1, "empty_response"), (2, "contradiction")
    ]  # fmt: skip


def test_the_limit_counts_usable_rows_and_stops_early(base_tokenizer):
    rows = [row(f"q{n}", "a", "b" if n % 2 else None) for n in range(3000)]
    told = []
    prepared = run(rows, base_tokenizer, limit=5, progress=told.append)
    assert [pair.row for pair in prepared.pairs] == [2, 4, 6, 8, 10]
    assert prepared.seen == told[-1] == 10 and len(prepared.notes) == 5
    assert run(rows[1::2], base_tokenizer, limit=7).seen == 7
    assert run([rows[0], rows[2], *rows[1::2]], base_tokenizer, limit=3).seen == 5  # in the middle of a batch
    assert len(run(rows, base_tokenizer, progress=told.append).pairs) == 1500
    assert told[-3:] == [1000, 2000, 3000]


def test_digest_depends_on_ids_and_on_where_they_part():
    def pair(*parts, row=1):
        return TokenPair(*(np.array(ids, np.int32) for ids in parts), row)

    one = pair([1, 2], [3], [4])
    assert one.digest == pair([1, 2], [3], [4], row=9).digest
    assert len({one.digest, pair([1], [2, 3], [4]).digest, pair([1, 2], [4], [3]).digest}) == 3


@pytest.mark.parametrize("seed", range(10))
def test_property_split_leaks_no_prompt_and_ignores_order(seed):
    pairs = random_pairs(seed)
    train, held_out = split_held_out(pairs, 0.1, 15, seed)
    assert 1 <= len(held_out) <= 15 and sorted(p.row for p in train + held_out) == [p.row for p in pairs]
    assert not {p.prompt.tobytes() for p in train} & {p.prompt.tobytes() for p in held_out}
    assert [p.row for p in held_out] == sorted(p.row for p in held_out)
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    assert {p.row for p in split_held_out(shuffled, 0.1, 15, seed)[1]} == {p.row for p in held_out}
    assert {p.row for p in split_held_out(pairs, 0.1, 15, seed + 1)[1]} != {p.row for p in held_out}


def test_split_gives_each_side_something_or_says_why_not():
    two = random_pairs(0, count=10, prompts=1) + random_pairs(1, count=3, prompts=1)
    train, held_out = split_held_out(two, 0.05, None, 0)
    assert (len(train), len(held_out)) == (10, 3)  # the share would be one pair, but a prompt stays together
    for limit in (None, 1000):
        assert len(split_held_out(random_pairs(2), 0.999, limit, 0)[0]) >= 1
    for pairs, limit in ((two[:10], None), (two, 2), (two[:1], None)):
        with pytest.raises(DataError, match="different prompts cannot be split"):
            split_held_out(pairs, 0.05, limit, 0)


@pytest.mark.parametrize("pairs", [random_pairs(3), []], ids=["many", "none"])
def test_saved_pairs_come_back_byte_for_byte(tmp_path, pairs):
    path = tmp_path / "pairs.safetensors"
    save_pairs(path, pairs)
    loaded = load_pairs(path)
    assert [(p.digest, p.row) for p in loaded] == [(p.digest, p.row) for p in pairs]
    assert all(p.prompt.dtype == np.int32 for p in loaded)
    first = path.read_bytes()
    save_pairs(path, loaded)
    assert path.read_bytes() == first and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_pairs_can_be_read_by_others_and_are_never_half_written(tmp_path):
    path = tmp_path / "pairs.safetensors"
    before = os.umask(0o022)
    try:
        save_pairs(path, random_pairs(1))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(DiskError, match="Cannot write"):
        save_pairs(path / "inside a file", [])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is not a file of prepared pairs"):
        load_pairs(path)
    with pytest.raises(DataError, match="is not a file of prepared pairs"):
        load_pairs(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not HH.exists(), reason="HH sample is not on this machine")
def test_hh_rows_are_all_used_or_accounted_for(chat_tokenizer):
    source = open_source(str(HH), shipped=HH.parent)
    rows = list(source.rows)
    prepared = run(rows, chat_tokenizer, max_tokens=2048, max_prompt_tokens=1024)
    reasons = {note.reason for note in prepared.notes}
    assert prepared.seen == 1600
    assert len(prepared.pairs) + sum(note.action == "dropped" for note in prepared.notes) == 1600
    assert {"prompts_differ", "empty_response"} <= reasons and "not_a_dialogue" not in reasons
    for pair in prepared.pairs[:200]:
        raw = rows[pair.row - 1]
        shown = chat_tokenizer.decode(
            pair.chosen[:-1] if pair.chosen[-1] == chat_tokenizer.eos_token_id else pair.chosen
        )
        # The whole last answer, though both answers may begin with the same letters.
        assert raw["chosen"].rpartition("\n\nAssistant:")[2].strip() == shown
