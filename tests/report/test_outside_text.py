"""The door to the terminal: text from outside is seen, and neither controls the terminal nor is taken for markup."""

import io
import json
import random
from pathlib import Path

import pytest
from rich.table import Table

from qdpo.report.screen.console import Screen
from qdpo.report.screen.outside_text import CleanStream, clean
from tests.collect.hostile import CODES
from tests.conftest import qdpo, write_jsonl

PACKAGE = Path(__file__).parents[2] / "qdpo"


def controls(text: str) -> set[str]:
    """The characters of a text that a terminal would act on."""
    codes = {*map(chr, range(32)), *map(chr, range(127, 160)), *map(chr, range(0x202A, 0x202F))}
    return (codes | {*map(chr, range(0x2066, 0x206A))}) & set(text) - {"\n", "\t"}


@pytest.mark.parametrize("seed", range(20))
def test_no_code_passes(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(chr(rng.choice([rng.randrange(256), rng.randrange(0x2000, 0x2070)])) for _ in range(300))
    stream = io.StringIO()
    CleanStream(stream).write(text + "\ud800")
    CleanStream(stream, may_redraw=True).write("x" + text)
    assert not controls(stream.getvalue()) and stream.getvalue().encode()


def test_json_keeps_its_meaning() -> None:
    value = {"text": "".join(CODES) + "\ud800\u202e é \u200f"}
    assert json.loads(clean(json.dumps(value, ensure_ascii=False))) == value


def test_bars_of_libraries_may_redraw() -> None:
    stream = io.StringIO()
    door = CleanStream(stream, may_redraw=True)
    for text in ("\r 10% a\x1b[2J.bin", "\n", "\x1b[A"):
        door.write(text)
    assert stream.getvalue() == "\r 10% a\\u001b[2J.bin\n\x1b[A"


def test_tables_are_cleaned_and_keep_their_colours(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    table = Table("[red]name[/red]")
    table.add_row("[bold]x[/bold]\x1b[2J\x9b5m")
    screen.print(table)
    screen.print("[/oops] \x1b]0;t\x07", style="red")
    shown = capsys.readouterr().out
    assert "[red]name[/red]" in shown and "[bold]x[/bold]" in shown and "[/oops]" in shown and not controls(shown)


def test_rows_are_shown_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": f"{code} [red]p", "chosen": f"a{code}", "rejected": "b[/x]"} for code in CODES]
    write_jsonl(tmp_path / "p\u202e[red].jsonl", rows)
    for words in (["show"], ["convert"]):
        found = qdpo("data", *words, "p\u202e[red].jsonl", *(["o.jsonl"] if words == ["convert"] else []), cwd=tmp_path)
        assert found.returncode == 0 and not controls(found.stdout + found.stderr)
    shown = qdpo("data", "show", "p\u202e[red].jsonl", cwd=tmp_path).stdout
    assert "[red]p" in shown and "b[/x]" in shown
    missing = qdpo("run", "preset=\x1b[31m", "data.path=\u202e", cwd=tmp_path)
    assert missing.returncode == 2 and not controls(missing.stderr)


def test_every_console_is_the_clean_one() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "Console(" not in text.replace("Screen(Console)", ""), path
        assert "sys.stdout.write" not in text and "__stdout__" not in text and "sys.stdout.buffer" not in text, path
