import json

from qdpo.data.layouts.pair import detect_layout
from qdpo.data.read.source import open_source
from qdpo.data.report import overlap_places, summary_lines, write_report
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Preparation

ROWS = [
    {"prompt": "q1", "chosen": "a long answer", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
    {"prompt": "q2", "chosen": "a long answer", "rejected": "c", "score_chosen": 3, "score_rejected": 2},
    {"prompt": "q3", "chosen": "é", "rejected": "é", "score_chosen": 3, "score_rejected": 2},
    {"prompt": "q4", "chosen": None, "rejected": "é", "score_chosen": 3, "score_rejected": 2},
    {"prompt": "q5", "chosen": "\x01" * 60, "rejected": "é", "score_chosen": 3, "score_rejected": 2},
]


def prepared_file(tmp_path, tokenizer):
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = open_source(str(path), shipped=tmp_path)
    layout = detect_layout(source.rows.read_sample(), {}, source.name)
    work = Preparation(tokenizer, Limits(52, 20), Renderer(tokenizer=tokenizer))
    work.add(source.rows.located(), layout, source=source.name)
    return work.finish(), layout, source


def test_the_summary_says_layout_counts_lengths_and_biases(tmp_path, base_tokenizer):
    prepared, layout, source = prepared_file(tmp_path, base_tokenizer)
    text = "\n".join(summary_lines(prepared, [layout], [source]))
    assert "prefs.jsonl" in text and f"layout: text: {layout.why}" in text
    assert "rows: 5 seen, 3 usable, 2 dropped, 1 cut" in text
    assert "dropped: identical_responses 1, null_field 1" in text
    assert "tokens (median / longest): prompt 2 / 2, " in text and "chosen is longer in 100% of pairs" in text
    assert "warning: length alone" in text
    assert "warning: score_chosen is below score_rejected in 33% of the pairs" in text


def test_the_report_has_a_line_for_each_row_that_was_touched(tmp_path, base_tokenizer):
    prepared, _, source = prepared_file(tmp_path, base_tokenizer)
    write_report(tmp_path / "report.jsonl", prepared.notes)
    written = (tmp_path / "report.jsonl").read_text(encoding="utf-8")
    assert "é" in written
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["row"], line["action"], line["reason"]) for line in lines] == [
        (3, "dropped", "identical_responses"),
        (4, "dropped", "null_field"),
        (5, "cut", "response_cut"),
    ]
    assert all(line["source"] == line["file"] == source.name and line["detail"] for line in lines)
    assert [line["line"] for line in lines] == [3, 4, 5]


def test_overlap_counts_held_out_pairs_with_a_trained_prompt(tmp_path, base_tokenizer):
    pairs = prepared_file(tmp_path, base_tokenizer)[0].pairs
    assert overlap_places(pairs[:2], pairs[1:]) == [0]
    assert overlap_places(pairs[:1], pairs[1:]) == []
