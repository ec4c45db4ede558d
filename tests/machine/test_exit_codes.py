"""Exit code 1 is a bug of qdpo: what the system refuses, a closed pipe and odd numbers have codes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdpo.cli.main import main
from tests.conftest import AS_USER

LONG = "n" * 300


def ended(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of the command line, in this process."""
    streams = sys.stdout, sys.stderr
    monkeypatch.setattr(sys, "argv", ["qdpo", *words])
    try:
        main()
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout, sys.stderr = streams
    return 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["runs", LONG], 6, LONG),
        (["eval", LONG], 6, LONG),
        (["cache", "ls", "--dir", LONG], 6, LONG),
        (["fit", "--gpu-gib", "8", "--mean", "nan"], 2, "--mean"),
        (["fit", "--gpu-gib", "8", "--mean", "0"], 2, "--mean"),
        (["fit", "--gpu-gib", "8", "--longest", "9" * 400], 2, "--longest"),
        (["fit", "--gpu-gib", "nan"], 2, "--gpu-gib"),
        (["plan", "preset=7b-24gb", "--others-gib", "inf"], 2, "--others-gib"),
        (["bench", "preset=demo", "--steps", "-1"], 2, "--steps"),
        (["compare", "runs/x", "--temperature", "1e-320"], 2, "--temperature"),
        (["compare", "runs/x", "--seed", "9" * 400], 2, "--seed"),
        (["judge", "c.jsonl", "--by", "length", "--margin", "nan", "--out", "o.jsonl"], 2, "--margin"),
    ],
)
def test_what_the_system_or_a_number_refuses_is_no_bug(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ended(words, monkeypatch) == code
    text = "".join(capsys.readouterr())
    assert said in text and "bug" not in text and "Traceback" not in text


def test_candidates_rubric_and_out_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "answers": [{"text": "a"}, {"text": "b b"}]}\n')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    judge = ["judge", "c.jsonl", "--by", "openai:http://127.0.0.1:9/v1", "--judge-model", "m", "--out"]
    for rubric in ("pipe", "endless", "."):
        assert ended([*judge, "o.jsonl", "--rubric", rubric], monkeypatch) == 2, rubric
    assert ended(["judge", "c.jsonl", "--by", "openai:http://[", "--judge-model", "m", "--out", "o"], monkeypatch) == 2
    for out in ("", "/"):
        assert ended([*judge, out], monkeypatch) == 2, out


def test_a_reader_that_has_gone_is_no_bug(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "qdpo", "presets"], env=AS_USER, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")
