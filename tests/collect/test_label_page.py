"""The page of `qdpo label` in a real browser, driven by keys: what is pressed is what is in the pairs."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collect.label_process import Label, candidates
from tests.conftest import write_jsonl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    made = browser.new_context(viewport={"width": 1400, "height": 900})
    made.set_default_timeout(8000)
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Label]]:
    """Starts `qdpo label` on candidates; whatever runs at the end is killed."""
    started: list[Label] = []

    def run(*words: str, rows: list[dict[str, Any]] | None = None) -> Label:
        if rows is not None:
            write_jsonl(tmp_path / "c.jsonl", rows)
        started.append(Label(tmp_path, *words))
        return started[-1]

    yield run
    for label in started:
        label.kill()


def opened(context: Any, label: Label) -> Any:
    """The page, with every error of its console kept in `page.troubles`."""
    page = context.new_page()
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.goto(label.address)
    page.wait_for_selector("body[data-ready]")
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def place(page: Any, word: str) -> int:
    """Number of the answer that begins with this word, as it is shown."""
    texts = page.eval_on_selector_all(".answer > .text", "found => found.map(one => one.textContent)")
    return next(number for number, text in enumerate(texts, 1) if text.startswith(word))


def pick(page: Any, best: str, worst: str) -> None:
    press(page, str(place(page, best)), f"Shift+Digit{place(page, worst)}")
    said(page, "Saved.")


def said(page: Any, text: str) -> None:
    playwright.expect(page.locator("#status")).to_contain_text(text)


def shows(page: Any, text: str) -> None:
    playwright.expect(page.locator("#prompt")).to_have_text(text)


def question(page: Any) -> str:
    return str(page.inner_text("#prompt .turn:last-child .text"))


def test_pick_edit_tie_skip_and_undo_by_keys_through_reload_and_kill(context: Any, start: Any) -> None:
    label = start(rows=candidates(6))
    page = opened(context, label)
    assert question(page) == "question 0"
    pick(page, "good", "poor")
    assert question(page) == "question 1" and label.pairs() == [("question 0", "good 0", "poor 0")]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert question(page) == "question 1"

    press(page, str(place(page, "fair")))
    said(page, "Now the worst one")
    press(page, "e")  # the one marked best
    assert page.input_value("textarea") == "fair 1"
    page.keyboard.type(", and 1 more: tsu")  # none of these letters is a shortcut here
    press(page, "Control+Enter")
    said(page, "Saved your edit.")
    assert label.pairs()[1] == ("question 1", "fair 1, and 1 more: tsu", "fair 1")
    press(page, "t")
    said(page, "Saved as a tie")
    press(page, "s")
    said(page, "Skipped")
    assert label.kinds() == ["pick", "edit", "tie", "skip"] and question(page) == "question 4"

    press(page, "u")  # the skip
    said(page, "Undone")
    assert question(page) == "question 3" and label.kinds()[-1] == "undo"
    pick(page, "poor", "good")
    press(page, "k")
    shows(page, "question 3")
    said(page, "Decided: answer")
    assert page.get_attribute(".answer.best", "aria-label") == f"Answer {place(page, 'poor')}, best"
    press(page, "u")
    said(page, "Undone")
    pick(page, "fair", "poor")
    assert label.pairs()[2] == ("question 3", "fair 3", "poor 3")

    assert question(page) == "question 4"
    press(page, "e")
    page.keyboard.type(" kept draft")
    before = label.kinds()
    label.kill()  # SIGKILL
    press(page, "Control+Enter")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "does not answer" in page.inner_text("#trouble")
    again = start("--port", str(label.port))
    assert again.kinds() == before and len(again.pairs()) == 3
    press(page, "Control+Enter")  # the old page with the old token
    playwright.expect(page.locator("#trouble")).to_contain_text("another start")
    with page.expect_navigation():
        page.evaluate("address => { location.href = address; }", again.address)
    page.wait_for_selector("body[data-ready]")
    shows(page, "question 4")
    press(page, "e")
    assert page.input_value("textarea").endswith(" kept draft")
    press(page, "Control+Enter")
    said(page, "Saved your edit.")
    assert question(page) == "question 5"
    press(page, str(place(page, "good")), f"Shift+Digit{place(page, 'fair')}")
    said(page, "Saved. Every prompt is decided.")
    pairs = {prompt: (chosen, rejected) for prompt, chosen, rejected in again.pairs()}
    assert pairs["question 5"] == ("good 5", "fair 5") and pairs["question 4"][0].endswith(" kept draft")
    assert len(pairs) == 5 and "question 2" not in pairs  # the tie
    ended = again.stop()
    assert "5 pairs in pairs.jsonl, 1 ties, 0 left to decide" in ended and "qdpo data check pairs.jsonl" in ended
    assert page.troubles and all("Failed to load resource" in text for text in page.troubles)  # of the killed server


def test_two_tabs_lose_nothing(context: Any, start: Any) -> None:
    label = start(rows=candidates(2))
    one, other = opened(context, label), opened(context, label)
    pick(one, "good", "poor")
    press(other, str(place(other, "fair")), f"Shift+Digit{place(other, 'good')}")
    said(other, "decided in another tab")
    assert label.pairs() == [("question 0", "good 0", "poor 0")]
    assert other.get_attribute(".answer.best", "aria-label") == f"Answer {place(other, 'good')}, best"
    press(other, str(place(other, "fair")))  # knowing it, the person may change it
    said(other, "Saved")
    assert label.pairs() == [("question 0", "fair 0", "poor 0")]
    pick(one, "poor", "good")
    assert sorted(label.kinds()) == ["pick"] * 3 and len(label.pairs()) == 2


def test_two_answers_need_one_key_and_composition_none(context: Any, start: Any) -> None:
    label = start(rows=candidates(3, answers=2))
    page = opened(context, label)
    for composing in ({"isComposing": True}, {"keyCode": 229}):
        page.evaluate(
            "more => document.body.dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 't', code: 'KeyT', bubbles: true, ...more}))",
            composing,
        )
    press(page, "n")
    page.keyboard.type("stu 12")
    press(page, "Enter")
    assert not (label.out.parent / "pairs.decisions.jsonl").exists()
    press(page, f"Shift+Digit{place(page, 'good')}")
    said(page, "Saved")
    assert label.pairs() == [("question 0", "fair 0", "good 0")]
    assert json.loads(label.out.read_text())["note"] == "stu 12"


def test_filter_search_and_blind(context: Any, start: Any) -> None:
    rows = candidates(4)
    rows[2]["answers"][0]["from"] = {"model": "other"}
    label = start("--blind", rows=rows)
    page = opened(context, label)
    pick(page, "good", "poor")
    press(page, "/")
    page.keyboard.type("question 2")
    shows(page, "question 2")
    assert page.inner_text("#place") == "Prompt 1 of 1" and "other" not in page.inner_text("body")
    assert page.locator(".cut").count() == 1  # the answer that ends at the length limit
    page.fill("#search", "")
    page.select_option("#filter", "pick")
    shows(page, "question 0")
    assert page.inner_text("#place") == "Prompt 1 of 1"


def test_every_control_has_a_name_and_the_page_fits_a_phone(context: Any, start: Any) -> None:
    label = start(rows=[*candidates(1), {"prompt": "p" * 300, "answers": ["a" * 500, "b c"]}])
    page = opened(context, label)
    tree = context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "searchbox", "combobox", "progressbar", "list", "listitem", "region")
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert len(controls) > 12 and all(node["name"]["value"] for node in controls)
    for width in (1400, 400, 320):
        page.set_viewport_size({"width": width, "height": 800})
        for key in ("j", "e", "Escape", "?", "Escape"):
            press(page, key)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.activeElement !== document.body")
    assert page.troubles == []


@pytest.mark.slow
def test_ten_thousand_prompts_open_in_two_seconds(context: Any, start: Any) -> None:
    """From the command to a page that can be used; a measurement, with room for a busy machine."""
    begun = time.monotonic()
    label = start(rows=candidates(10_000, answers=3))
    page = opened(context, label)
    took = time.monotonic() - begun
    print(f"10,000 prompts: {took:.2f} s")
    assert "of 10000" in page.inner_text("#place") and took < 20
    os.kill(label.process.pid, signal.SIGKILL)
