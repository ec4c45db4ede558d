"""docs/architecture.md is the page of this code: its picture and lists follow from the imports."""

import importlib.util
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tests.test_imports import FILES, LAYER, imports, room

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("architecture", str(ROOT / "scripts" / "architecture"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("architecture", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    found, new = set[str](), set(arrows.get(start, ()))
    while new:
        found |= new
        new = {other for one in new for other in arrows.get(one, ())} - found
    return found


def test_the_page_is_that_of_the_code() -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "architecture"), "--check"], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_arrows_of_the_picture_lead_to_every_import_and_to_nothing_else() -> None:
    """Read from the page itself, against the imports as tests/test_imports.py reads them."""
    arrows: dict[str, set[str]] = {}
    names = {"main_": "__main__"} | {f"{name}_": name for name in LAYER}
    for one, other in re.findall(r"^    (\w+) --> (\w+)$", PAGE, re.MULTILINE):
        arrows.setdefault(names[one], set()).add(names[other])
    for home in {room(path) for path in FILES} - {"__init__"}:
        imported = {
            name.split(".")[1] for path in FILES if room(path) == home for name in imports(path) if "qdpo." in name
        }
        wanted = (imported & LAYER.keys()) - {home, "__init__"}
        assert wanted <= reached(arrows, home), home
        assert arrows.get(home, set()) <= wanted, home


def test_no_arrow_follows_from_others() -> None:
    arrows: dict[str, set[str]] = {}
    for one, other in re.findall(r"^    (\w+) --> (\w+)$", PAGE, re.MULTILINE):
        arrows.setdefault(one, set()).add(other)
    assert len(arrows) > 10
    for one, others in arrows.items():
        for other in others:
            assert other not in reached({**arrows, one: others - {other}}, one), (one, other)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    cli_ --> measure_\n", "", "out of date"),
        ("The verbs that train: run, sweep.", "Another sentence.", "out of date"),
        ("<!-- made by scripts/architecture: rooms -->", "", "needs the block"),
    ],
)
def test_a_stale_page_is_an_exit_code(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    old: str, new: str, said: str,
) -> None:  # fmt: skip
    assert old in PAGE
    page = tmp_path / "docs" / "architecture.md"
    page.parent.mkdir()
    page.write_text(PAGE.replace(old, new, 1), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["architecture", "--check"])
    assert script.main() == 1
    assert said in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == PAGE.replace(old, new, 1)


def test_a_folder_without_a_sentence_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "FOLDERS", {**script.FOLDERS, "gone": "Nothing."})
    with pytest.raises(LookupError, match="gone"):
        script.filled(PAGE)
    monkeypatch.setattr(script, "FOLDERS", {})
    with pytest.raises(LookupError, match="has no sentence"):
        script.filled(PAGE)
