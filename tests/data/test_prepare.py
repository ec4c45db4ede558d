"""From settings to stored pairs: several sources, weights, long prompts, limits on what may be lost, and the verbs."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from qdpo.cli.main import app
from qdpo.data import prepare
from qdpo.data.layouts.origin import Origin
from qdpo.data.report import make_report
from qdpo.data.tokens.store import Spool, TokenPair, load_pairs, save_pairs
from qdpo.errors import ConfigError, DataError
from qdpo.settings import layered
from tests.conftest import Quiet, qdpo, tiny_rows, write_jsonl


def prepared(tokenizer, path, **settings):
    given = [f"data.{name}={value}" for name, value in settings.items()]
    config = layered.resolve(["model.path=given", f"data.path={path}", *given]).config.data
    watcher = Quiet()
    return prepare.prepare_data(config, tokenizer, seed=0, watcher=watcher), watcher.text


@pytest.fixture
def two_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", tiny_rows(60))
    write_jsonl(tmp_path / "b.jsonl", tiny_rows(40, seed=1))
    return f"{tmp_path / 'a.jsonl'}+{tmp_path / 'b.jsonl'}"


def test_several_sources_are_joined_and_weighted(chat_tokenizer, two_files):
    both, text = prepared(chat_tokenizer, two_files, eval_fraction=0.1)
    assert len(both.train) + len(both.held_out) == 100 and text.count("layout:") == 2
    assert len(both.files) == 2 and both.about.source.count(" + ") == 1
    weighted, _ = prepared(chat_tokenizer, two_files, eval_fraction=0.1, weights="2+0.5")
    assert [pair.digest for pair in weighted.held_out] == [pair.digest for pair in both.held_out]
    times = Counter(pair.digest for pair in weighted.train)
    counts = Counter(times[pair.digest] for pair in both.train)
    assert set(counts) == {0, 1, 2} and 50 <= counts[2] <= 60 and counts[0] + counts[1] + counts[2] == len(both.train)
    assert 8 <= counts[1] <= 30
    with pytest.raises(ConfigError, match=r"data\.weights has 3 numbers, but .* names 2 sources"):
        prepared(chat_tokenizer, two_files, weights="1+1+1")


def test_a_duplicate_in_another_source_names_it(chat_tokenizer, tmp_path):
    rows = tiny_rows(20)
    path = f"{write_jsonl(tmp_path / 'a.jsonl', rows)}+{write_jsonl(tmp_path / 'b.jsonl', rows[:1])}"
    data, _ = prepared(chat_tokenizer, path)
    (note,) = data.notes
    assert note.reason == "duplicate" and "row 1 of" in note.detail and note.place.line == 1
    assert note.place.file.endswith("b.jsonl")


def test_too_many_lost_rows_stop_a_run_until_allowed(chat_tokenizer, tmp_path):
    rows = tiny_rows(40)
    for row in rows[::5]:
        row["rejected"] = ""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"20% of the pairs cannot be used \(empty_response 8\).*For example .*line 1:"):
        prepared(chat_tokenizer, path)
    data, text = prepared(chat_tokenizer, path, max_drop_fraction=0.2)
    assert len(data.train) + len(data.held_out) == 32 and "dropped: empty_response 8" in text
    ties = [{**row, "status": "tie"} if n % 2 else row for n, row in enumerate(tiny_rows(40))]
    assert len(prepared(chat_tokenizer, write_jsonl(tmp_path / "b.jsonl", ties))[0].train) < 21


def talk(count, last="and now?"):
    turns = [{"role": "system", "content": "Be kind."}]
    for number in range(count):
        turns += [{"role": "user", "content": f"question {number} " * 8}, {"role": "assistant", "content": "answer"}]
    return [*turns, {"role": "user", "content": last}]


def test_a_long_prompt_loses_whole_turns_from_its_front_on_demand(chat_tokenizer, tmp_path):
    rows = [{"prompt": talk(n % 6, f"and now {n}?"), "chosen": "yes", "rejected": "no"} for n in range(12)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    allowed = {"max_tokens": 240, "max_prompt_tokens": 200, "max_drop_fraction": 1}
    dropped, _ = prepared(chat_tokenizer, path, **allowed)
    lost = {note.row for note in dropped.notes if note.reason == "prompt_too_long"}
    assert lost and len(lost) < 12
    kept, text = prepared(chat_tokenizer, path, long_prompt="drop_oldest_turns", **allowed)
    assert {note.row for note in kept.notes if note.reason == "oldest_turns_dropped"} == lost and "mended:" in text
    for pair in [*kept.train, *kept.held_out]:
        shown = chat_tokenizer.decode(pair.prompt)
        assert len(pair.prompt) <= 200 and "Be kind." in shown and f"and now {pair.row - 1}?" in shown
        assert shown.count("<|im_start|>user") == 1 + shown.count("answer")
    one = write_jsonl(tmp_path / "b.jsonl", [{"prompt": talk(0, "word " * 300), "chosen": "y", "rejected": "n"}, *rows])
    still, _ = prepared(chat_tokenizer, one, long_prompt="drop_oldest_turns", **allowed)
    assert [note.row for note in still.notes if note.action == "dropped"] == [1]


def test_bad_lines_are_left_out_on_demand_and_named(chat_tokenizer, tmp_path):
    lines = [json.dumps(row) for row in tiny_rows(30)]
    lines[6] = lines[6][:-4]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"line 7 is not JSON.*skip_bad_lines=true"):
        prepared(chat_tokenizer, path)
    data, _ = prepared(chat_tokenizer, path, skip_bad_lines="true")
    (note,) = data.notes
    assert (note.reason, note.row, note.place.line) == ("unreadable_line", 7, 7) and "line 7 is not JSON" in note.detail
    assert len(data.train) + len(data.held_out) == 29


def test_held_out_prompts_that_are_trained_on_are_counted_or_left_out(chat_tokenizer, tmp_path):
    rows = tiny_rows(30)
    train, held = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[:4] + tiny_rows(9, 7))
    data, text = prepared(chat_tokenizer, train, eval_path=held)
    assert len(data.held_out) == 13 and "4 held-out prompts are also trained on" in text
    data, text = prepared(chat_tokenizer, train, eval_path=held, drop_overlap="true")
    assert len(data.held_out) == 9 and "4 held-out pairs left out" in text


def test_the_report_counts_what_each_length_would_drop(chat_tokenizer, tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"q{n}", "chosen": "x" * n, "rejected": "no"} for n in range(1, 1500)]
    )
    config = layered.resolve(["model.path=given", f"data.path={path}", "data.max_tokens=1024"]).config.data
    found = prepare.read_data(config, chat_tokenizer, Quiet())
    limits = prepare.limits_of(config)
    report = make_report(
        found.prepared, found.layouts, found.sources, limits, max_drop_fraction=0.1, overlap=None,
        policy=Origin("given"), template_notes=[],
    )  # fmt: skip
    at = {row["max_tokens"]: row for row in report.what_if}
    assert at[1024]["dropped"] == sum(report.dropped.values()) and at[1024]["cut"] == report.cut
    assert at[16384] == {"max_tokens": 16384, "whole": 1499, "cut": 0, "dropped": 0}
    assert all(row["whole"] + row["cut"] + row["dropped"] == 1499 for row in report.what_if)
    assert at[512]["whole"] < at[1024]["whole"] and report.chosen_longer > 0.9
    assert report.length_correlation > 0.5 and any("length alone" in warning for warning in report.warnings)


def test_ids_are_mapped_from_disk_and_readable_by_others(tmp_path):
    spool, rng = Spool(tmp_path), np.random.default_rng(0)
    pairs = [TokenPair(*(rng.integers(0, 99, n, dtype=np.int32) for n in (3 + k % 5, 2, 4)), k) for k in range(50)]
    assert [spool.add(pair) for pair in pairs] == list(range(50))
    stored = spool.store(range(0, 50, 2))
    assert [pair.digest for pair in stored] == [pair.digest for pair in pairs[::2]] and not list(tmp_path.iterdir())
    path = tmp_path / "pairs.safetensors"
    save_pairs(path, stored[3:9])
    loaded = load_pairs(path)
    assert [(p.digest, p.row) for p in loaded] == [(p.digest, p.row) for p in pairs[6:18:2]]
    assert isinstance(loaded[0].prompt.base, np.memmap) or isinstance(loaded[0].prompt, np.memmap)
    assert [p.row for p in loaded.select([2, 2, 0])] == [10, 10, 6] and loaded[-1].row == 16
    assert load_file(path)["ids"].tolist() == [
        int(i) for p in loaded for part in (p.prompt, p.chosen, p.rejected) for i in part
    ]
    assert load_file(path)["lengths"].tolist() == loaded.lengths.tolist()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_verbs_check_show_convert_and_split(tiny_base, tmp_path):
    rows = tiny_rows(60)
    rows[4]["chosen"] = rows[4]["rejected"]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    done = qdpo("data", "check", "pairs.jsonl.gz", f"model.path={tiny_base}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("layout: text", "dropped: identical_responses", "data.max_tokens", "verdict: fit to train", "‹"):
        assert words in done.stdout
    (noted,) = lines(tmp_path / "data_report.jsonl")
    assert (noted["line"], noted["action"], noted["reason"]) == (5, "dropped", "identical_responses")
    asked = qdpo(
        "data", "check", "pairs.jsonl.gz", f"model.path={tiny_base}", "--json", "data.max_tokens=40", cwd=tmp_path
    )
    assert asked.returncode == 3 and json.loads(asked.stdout)["fit"] is False
    shown = qdpo("data", "show", "pairs.jsonl.gz", "--row", "5", cwd=tmp_path)
    assert shown.returncode == 0 and "row 5 is not used (identical_responses)" in shown.stdout
    assert qdpo("data", "show", "pairs.jsonl.gz", "--row", "99", cwd=tmp_path).returncode == 2
    converted = qdpo("data", "convert", "pairs.jsonl.gz", "plain.jsonl", cwd=tmp_path)
    assert "59 pairs; left out: identical_responses 1" in converted.stdout
    assert lines(tmp_path / "plain.jsonl")[0] == {
        "prompt": [{"role": "user", "content": rows[0]["prompt"]}],
        "chosen": [{"role": "assistant", "content": rows[0]["chosen"]}],
        "rejected": [{"role": "assistant", "content": rows[0]["rejected"]}],
    }
    assert qdpo("data", "convert", "pairs.jsonl.gz", "plain.jsonl", cwd=tmp_path).returncode == 2
    split = qdpo("data", "split", "plain.jsonl", "parts", "--fraction", "0.2", cwd=tmp_path)
    assert split.returncode == 0, split.stderr
    train, held = lines(tmp_path / "parts/train.jsonl"), lines(tmp_path / "parts/held_out.jsonl")
    assert len(train) == 47 and len(held) == 12
    assert not {json.dumps(row["prompt"]) for row in train} & {json.dumps(row["prompt"]) for row in held}
    refused = qdpo("data", "show", "pairs.jsonl.gz", "model.path=x", cwd=tmp_path)
    assert refused.returncode == 2 and "Give only data.* settings" in refused.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["convert", "pairs.jsonl", "--out=plain.jsonl"], "There is no option '--out=plain.jsonl' here"),
        (["convert", "pairs.jsonl", "--out", "plain.jsonl"], "There is no option '--out' here"),
        (["split", "pairs.jsonl", "--to=folder"], "There is no option '--to=folder' here"),
        (["show", "pairs.jsonl", "--rows", "3"], "There is no option '--rows' here"),
        (["show", "pairs.jsonl", "3"], "Cannot read '3'. Settings are written key=value"),
        (["show", "pairs.jsonl", "model.path=x"], "model.path=x has no effect here: no model is involved"),
    ],
)
def test_a_word_that_is_no_argument_writes_nothing(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """typer takes an unknown option for the next positional argument: a file named --out=plain.jsonl was written."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(4))
    found = CliRunner().invoke(app, ["data", *words])
    assert isinstance(found.exception, ConfigError) and told in str(found.exception), found.output
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
