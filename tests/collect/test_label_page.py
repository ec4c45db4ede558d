"""The label page in a real browser, driven by keyboard: what ends up in the files, and what no crash may lose."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qdpo.collect.decisions import journal_of
from tests.conftest import ROOT, write_jsonl

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>"


class Sitting:
    """`qdpo label` as a user starts it, in a folder with candidates."""

    def __init__(self, folder: Path, *options: str, port: int = 0):
        self.out = folder / "pairs.jsonl"
        command = [sys.executable, "-m", "qdpo", "label", "candidates.jsonl", "--out", "pairs.jsonl"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options], cwd=folder, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "http" in line)
        self.address = re.findall(r"http\S+", line)[0]
        self.port = int(self.address.split(":")[2].split("/")[0])

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def stop(self) -> str:
        """Ctrl-C; what is printed at the end."""
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=10)
        assert self.process.returncode == 0
        return said

    def pairs(self) -> list[tuple[str, str, str]]:
        return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in read(self.out)]

    def kinds(self) -> list[str]:
        return [line["kind"] for line in read(journal_of(self.out))]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {n}", "answers": [f"{word} {n} {HOSTILE}" for word in "abcd"]} for n in range(4)]
    rows.append({"prompt": "question 4", "answers": ["a 4", {"text": "b 4", "cut": True}]})
    write_jsonl(tmp_path / "candidates.jsonl", rows)
    return tmp_path


@pytest.fixture
def sitting(folder: Path) -> Iterator[Sitting]:
    made = Sitting(folder)
    yield made
    made.kill()


def opened(browser: Any, address: str, **context: Any) -> Any:
    """A tab whose every complaint is kept in `tab.complaints`."""
    tab = browser.new_context(**context).new_page()
    tab.set_default_timeout(5000)
    tab.complaints = []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("body[data-ready]")
    return tab


def press(tab: Any, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)


def shown(tab: Any) -> tuple[str, list[str]]:
    """The prompt on the page, and its answers in their order."""
    texts = "[...document.querySelectorAll('.answer .text')].map((box) => box.firstChild.textContent)"
    return tab.text_content("#turns"), tab.evaluate(texts)


def wait_for(tab: Any, said: str, where: str = "#status") -> None:
    tab.wait_for_function(
        "([where, said]) => document.querySelector(where).textContent.includes(said)", arg=[where, said]
    )


def test_by_keyboard_from_the_first_pick_to_the_last(browser: Any, sitting: Sitting) -> None:
    tab = opened(browser, sitting.address)
    assert "token" not in tab.url and tab.title() == "qdpo label"
    prompt, answers = shown(tab)
    press(tab, "2")
    wait_for(tab, "Answer 2 is best. Which is worst?")
    press(tab, "Shift+Digit4")
    wait_for(tab, "Saved: answer 2 best, answer 4 worst")
    expected = [(prompt, answers[1], answers[3])]
    assert sitting.pairs() == expected and shown(tab)[0] == "question 1"

    prompt, answers = shown(tab)
    press(tab, "e", "3", "Control+a")
    tab.keyboard.type("3 tests, 1 text: ")  # letters and digits that are keys elsewhere
    press(tab, "Enter")
    tab.keyboard.type("better\u2028\U0001f600")
    press(tab, "Control+Enter")
    wait_for(tab, "Saved: your text over answer 3")
    expected.append((prompt, "3 tests, 1 text: \nbetter\u2028\U0001f600", answers[2]))
    assert sitting.pairs() == expected

    press(tab, "n")
    tab.keyboard.type("stun")
    press(tab, "Enter", "t")
    wait_for(tab, "Saved: a tie")
    press(tab, "s")
    wait_for(tab, "Saved: skipped")
    prompt, answers = shown(tab)
    assert prompt == "question 4" and tab.locator(".cut").count() == 1
    press(tab, "1")  # with two answers one key is enough
    wait_for(tab, "All 5 prompts are decided")
    expected.append((prompt, answers[0], answers[1]))
    assert sitting.pairs() == expected

    press(tab, "u")
    wait_for(tab, "Taken back")
    assert sitting.pairs() == expected[:2] and shown(tab)[0] == "question 4"
    press(tab, "u")
    wait_for(tab, "Prompt 4 of 5", "#prompt-title")
    assert sitting.kinds() == ["pick", "edit", "tie", "skip", "pick", "undo", "undo"]
    assert read(journal_of(sitting.out))[2]["note"] == "stun"
    assert all(line["seconds"] >= 0 and len(line["shown"]) > 1 for line in read(journal_of(sitting.out))[:5])
    assert tab.complaints == [] and tab.title() == "qdpo label"
    said = sitting.stop()
    assert "2 pairs (1 edited), 1 ties, 0 skipped, 2 undecided" in said and "qdpo data check pairs.jsonl" in said


def test_reload_and_kill_lose_nothing(browser: Any, sitting: Sitting, folder: Path) -> None:
    tab = opened(browser, sitting.address)
    press(tab, "1")
    tab.reload()
    tab.wait_for_selector("body[data-ready]")
    assert tab.get_attribute(".answer:nth-child(1) .choices .best", "aria-pressed") == "true"  # half a choice is kept
    press(tab, "Shift+Digit2")
    wait_for(tab, "Saved")
    before = sitting.pairs()
    press(tab, "e", "2", "Control+a")
    tab.keyboard.type("half writ")
    sitting.kill()
    tab.keyboard.type("ten")
    press(tab, "Control+Enter")
    wait_for(tab, "The server does not answer, so nothing was saved", "#alarm")
    anew = Sitting(folder, port=sitting.port)
    try:
        press(tab, "Control+Enter")
        wait_for(tab, "The server was restarted", "#alarm")
        assert anew.pairs() == before and tab.input_value(".answer:nth-child(2) textarea") == "half written"
        tab.goto(anew.address)  # only the fragment differs: the page takes the token and loads itself anew
        tab.wait_for_selector("textarea:focus")
        assert shown(tab)[0] == "question 1" and tab.input_value(".answer:nth-child(2) textarea") == "half written"
        press(tab, "Control+Enter")
        wait_for(tab, "Saved: your text over answer 2")
        assert anew.pairs()[0] == before[0] and anew.pairs()[1][:2] == ("question 1", "half written")
        anew.kill()
        assert anew.kinds() == ["pick", "edit"]
    finally:
        anew.kill()


def test_two_tabs_do_not_overwrite_each_other(browser: Any, sitting: Sitting) -> None:
    first, second = opened(browser, sitting.address), opened(browser, sitting.address)
    press(first, "1", "Shift+Digit2")
    wait_for(first, "Saved")
    before = sitting.pairs()
    press(second, "3", "Shift+Digit4")
    wait_for(second, "Nothing was overwritten", "#alarm")
    wait_for(second, "Decided: answer 1 is best, answer 2 worst", "#banner-text")
    assert sitting.pairs() == before and sitting.kinds() == ["pick"]


def test_keys_of_an_input_method_are_not_taken(browser: Any, sitting: Sitting) -> None:
    tab = opened(browser, sitting.address)
    composing = (
        "(key) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, code: 'KeyT', bubbles: true, %s}))"
    )
    tab.evaluate(composing % "isComposing: true", "t")
    tab.evaluate(composing % "keyCode: 229", "t")
    press(tab, "Control+s")
    press(tab, "s")
    wait_for(tab, "Saved: skipped")
    tab.evaluate(composing % "", "е")  # a Cyrillic layout: the place of the key counts
    wait_for(tab, "Saved: a tie")
    assert sitting.kinds() == ["skip", "tie"]


def test_filter_search_and_moving(browser: Any, sitting: Sitting) -> None:
    tab = opened(browser, sitting.address)
    press(tab, "t")
    wait_for(tab, "Saved")
    press(tab, "/")
    tab.keyboard.type("B 3")
    wait_for(tab, "1 / 1", "#place")
    assert shown(tab)[0] == "question 3"
    tab.fill("#search", "")
    wait_for(tab, "4 / 5", "#place")
    tab.select_option("#filter", "tie")
    wait_for(tab, "1 / 1", "#place")
    assert shown(tab)[0] == "question 0" and tab.inner_text("#banner").startswith("Decided: a tie.")
    tab.select_option("#filter", "all")
    tab.focus("#prompt-title")
    press(tab, "j")
    wait_for(tab, "2 / 5", "#place")
    press(tab, "ArrowRight")
    wait_for(tab, "3 / 5", "#place")
    press(tab, "k")
    wait_for(tab, "2 / 5", "#place")


def test_it_can_be_read_everywhere(browser: Any, sitting: Sitting) -> None:
    """Nothing is wider than a phone, every control has a name, and Tab reaches every button."""
    tab = opened(browser, sitting.address, viewport={"width": 320, "height": 640}, color_scheme="dark")
    press(tab, "e", "1")
    for width in (320, 400):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    nodes = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "searchbox", "combobox", "checkbox", "progressbar", "article"}
    names = [(node["role"]["value"], node["name"]["value"]) for node in nodes
             if not node["ignored"] and node["role"]["value"] in controls]  # fmt: skip
    assert all(name for _, name in names), names
    assert {("button", "Best: Answer 2"), ("textbox", "A better text in the place of answer 1")} <= set(names)
    press(tab, "Escape")
    press(tab, "Tab", "Tab")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Worst: Answer 2"
    press(tab, "?")
    assert tab.is_visible("#keys")
    press(tab, "t", "Escape")  # no key works behind the list of keys
    assert not tab.is_visible("#keys") and not journal_of(sitting.out).exists()


def test_agreement_asks_again_and_changes_no_pair(browser: Any, folder: Path) -> None:
    write_jsonl(folder / "candidates.jsonl", [{"prompt": "only", "answers": ["a", "b"]}])
    sitting = Sitting(folder, "--agreement", "--blind")
    try:
        tab = opened(browser, sitting.address)
        first = shown(tab)[1]
        press(tab, "1")
        wait_for(tab, "Asked a second time", "#banner-text")
        assert shown(tab)[1] == first[::-1]
        press(tab, "1")
        wait_for(tab, "0 of 1 (0 %)", "#figures")
        assert sitting.pairs() == [("only", first[0], first[1])]
        assert "agreement with yourself: 0 of 1 (0%)" in sitting.stop()
    finally:
        sitting.kill()
