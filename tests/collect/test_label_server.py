"""The server of `qdpo label`: who may ask it what, and that nothing is said to be saved that is not."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qdpo.collect import labelling as labelling_module
from qdpo.collect.candidates import read_candidates
from qdpo.collect.decisions import Decision, Decisions
from qdpo.collect.labelling import Labelling, Place, bias
from qdpo.collect.server import LabelServer
from qdpo.errors import ConfigError
from tests.collect.label_process import candidates
from tests.conftest import qdpo, write_jsonl

Ask = Callable[..., tuple[int, Any]]


def serve(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> LabelServer:
    items = read_candidates([write_jsonl(tmp_path / "c.jsonl", rows)]).items
    server = LabelServer(Labelling(Decisions(tmp_path / "pairs.jsonl", items), **settings))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabelServer]:
    made = serve(tmp_path, candidates(3))
    yield made
    made.shutdown()
    made.server_close()


def ask(server: LabelServer, method: str, path: str, body: Any = None, **changes: str | None) -> tuple[int, Any, Any]:
    """Status, parsed body and headers; `changes` replaces the headers that the page would send, None leaves one out."""
    host = f"127.0.0.1:{server.server_port}"
    headers: dict[str, str | None] = {"Host": host, "X-Qdpo-Token": server.token}
    if method == "POST":
        headers |= {"Origin": f"http://{host}", "Content-Type": "application/json"}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    text = json.dumps(body).encode() if not isinstance(body, bytes) else body
    if method == "POST" and "Content-Length" not in headers:
        headers["Content-Length"] = str(len(text))
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(text if method == "POST" else None)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    kind = response.headers.get_content_type()
    return response.status, json.loads(content) if kind == "application/json" else content, response.headers


def picked(server: LabelServer, number: int = 0, **changes: Any) -> dict[str, Any]:
    item = list(server.labelling.decisions.items.values())[number]
    best, worst = item.answers[0].id, item.answers[2].id
    return {"prompt": item.id, "kind": "pick", "best": best, "worst": worst, "count": 0, "seconds": 2.0, **changes}


def test_a_decision_is_on_disk_when_the_answer_comes(server: LabelServer, tmp_path: Path) -> None:
    status, found, _ = ask(server, "POST", "/api/decide", picked(server))
    assert status == 200 and found["entry"]["state"] == "pick" and found["stats"]["pairs"] == 1
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["chosen"] == "good 0"
    status, view, _ = ask(server, "GET", f"/api/prompt/{found['entry']['id']}")
    assert view["decision"]["kind"] == "pick" and view["count"] == 1


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:{port}"}, 421),
        ({"Host": None}, 421),
        ({"X_Qdpo_Token": "wrong"}, 403),
        ({"X_Qdpo_Token": None}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Length": "99999999"}, 413),
        ({"Content_Length": "-1"}, 413),
    ],
)
def test_what_another_page_could_send_is_refused(
    server: LabelServer, tmp_path: Path, changes: dict[str, str | None], status: int
) -> None:
    changes = {name: value and value.format(port=server.server_port) for name, value in changes.items()}
    assert ask(server, "POST", "/api/decide", picked(server), **changes)[0] == status
    assert not (tmp_path / "pairs.decisions.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{"Host": "evil.example"}, {"X_Qdpo_Token": None}, {"Origin": "https://evil.example"}]
)
def test_nothing_is_read_by_another_page(server: LabelServer, changes: dict[str, str | None]) -> None:
    assert ask(server, "GET", "/api/prompts", **changes)[0] in (403, 421)


@pytest.mark.parametrize(
    "path",
    ["/../label.js", "/..%2f..%2fpyproject.toml", "/label.py", "//etc/passwd", "/pages/label.html", "/%00"],
)
def test_no_other_file_is_served(server: LabelServer, path: str) -> None:
    status, found, _ = ask(server, "GET", path)
    assert status == 404 and found == {"error": "There is no such page."}


def test_the_page_itself_holds_no_data_and_may_load_nothing_else(server: LabelServer) -> None:
    status, page, headers = ask(server, "GET", "/", X_Qdpo_Token=None)
    assert status == 200 and b"question" not in page and server.token.encode() not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        ([1], 400, "not a JSON object"),
        ({"prompt": "nope", "kind": "pick"}, 400, "There is no prompt"),
        ({"kind": "open"}, 400, "cannot be taken here"),
        ({"worst": "x"}, 400, "names an answer that is not among"),
        ({"seconds": -3}, 400, "no number of seconds"),
        ({"note": "\ud83d"}, 400, "half a character"),
        ({"kind": "edit", "text": 5}, 400, "text must be a text"),
        ({"count": 3}, 409, "decided elsewhere"),
    ],
)
def test_a_decision_that_cannot_be_taken_says_why(
    server: LabelServer, tmp_path: Path, body: Any, status: int, said: str
) -> None:
    if isinstance(body, dict) and "prompt" not in body:
        body = picked(server) | body
    found = ask(server, "POST", "/api/decide", body)
    assert found[0] == status and said in found[1]["error"]
    assert not (tmp_path / "pairs.decisions.jsonl").exists()


def test_blind_says_no_model_anywhere(tmp_path: Path) -> None:
    rows = candidates(1)
    rows[0]["answers"][0]["from"] = {"model": "other"}
    for blind in (False, True):
        server = serve(tmp_path, rows, blind=blind)
        paths = ("/api/prompts", f"/api/prompt/{next(iter(server.labelling.decisions.items))}")
        views = json.dumps([ask(server, "GET", path)[1] for path in paths])
        assert ("other" in views, "tiny" in views) == (not blind, not blind)
        server.shutdown()
        server.server_close()


def test_a_taken_port_is_said(server: LabelServer) -> None:
    with pytest.raises(ConfigError, match=f"--port={server.server_port} .* Leave --port out"):
        LabelServer(server.labelling, server.server_port)


def test_agreement_asks_picks_again_in_another_order_and_changes_no_pair(tmp_path: Path) -> None:
    items = read_candidates([write_jsonl(tmp_path / "c.jsonl", candidates(40))]).items
    labelling = Labelling(Decisions(tmp_path / "pairs.jsonl", items), agreement=True)
    asked = []
    for number, item in enumerate(items):
        view = labelling.view(item.id)
        best, worst = (view["answers"][n]["id"] for n in (0, 1))
        due = labelling.take({"prompt": item.id, "kind": "pick", "best": best, "worst": worst, "count": 0})["again"]
        assert due is None or number >= labelling_module.AFTER
        if due:
            view = labelling.view(due, again=True)
            assert view["again"] and view["decision"] is None and view["count"] == 1
            first = labelling.decisions.current(due)
            assert first is not None
            best = first.best if not asked else next(a["id"] for a in view["answers"] if a["id"] != first.best)
            worst = next(answer["id"] for answer in view["answers"] if answer["id"] != best)
            labelling.take({"prompt": due, "kind": "pick", "best": best, "worst": worst, "count": 1, "again": True})
            asked.append(due)
    assert len(set(asked)) == len(asked) == 2 and labelling.stats()["agreement"] == {"asked": 2, "same": 1}
    assert labelling.stats()["pairs"] == 40 and "in 1 of 2 (50%)" in "\n".join(labelling.summary())
    kept = [json.loads(line) for line in (tmp_path / "pairs.decisions.jsonl").read_text().splitlines()]
    shown = {
        again: {d["prompt"]: d["shown"] for d in kept if d.get("again", False) == again} for again in (False, True)
    }
    assert all(sorted(order) == sorted(shown[False][id_]) for id_, order in shown[True].items())
    assert any(order != shown[False][id_] for id_, order in shown[True].items())


def test_a_place_that_is_picked_too_often_is_noted(tmp_path: Path) -> None:
    items = read_candidates([write_jsonl(tmp_path / "c.jsonl", candidates(60))]).items
    fair, first = (Labelling(Decisions(tmp_path / name, items)) for name in ("fair.jsonl", "first.jsonl"))
    for item in items:
        shown = [answer["id"] for answer in fair.view(item.id)["answers"]]
        for labelling, best in ((fair, item.answers[0].id), (first, shown[0])):
            worst = next(id_ for id_ in shown if id_ != best)
            labelling.take({"prompt": item.id, "kind": "pick", "best": best, "worst": worst, "count": 0})
    assert first.stats()["places"][0] == {"picked": 60, "expected": pytest.approx(20)}
    assert "place 1 is picked more often" in first.stats()["bias"] and fair.stats()["bias"] == ""
    assert bias([Place(19, 5.0, 4.0), Place()]) == ""  # too few to tell


def test_undo_finds_the_newest_decision_of_a_person(server: LabelServer) -> None:
    labelling = server.labelling
    ids = list(labelling.decisions.items)
    assert labelling.last() is None
    labelling.decisions.add(Decision(ids[2], "open", by="length", note="equal"))
    assert labelling.last() is None
    labelling.decisions.add(Decision(ids[0], "tie"))
    labelling.decisions.add(Decision(ids[1], "skip"))
    assert labelling.last() == ids[1]
    labelling.decisions.add(Decision(ids[1], "undo"))
    assert labelling.last() == ids[0]


def test_search_looks_into_prompts_answers_and_notes(server: LabelServer) -> None:
    ids = list(server.labelling.decisions.items)
    server.labelling.take(picked(server, 1, note="Needs a SOURCE"))
    assert ask(server, "POST", "/api/search", {"text": "FAIR 2"})[1] == {"ids": [ids[2]]}
    assert ask(server, "POST", "/api/search", {"text": "source"})[1] == {"ids": [ids[1]]}
    assert ask(server, "POST", "/api/search", {"text": "question"})[1] == {"ids": ids}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{broken\n", "c.jsonl line 1 is not JSON"),
        (None, "c.jsonl"),
        ('{"prompt": "p", "answers": ["a", ""]}\n', "no prompt"),
    ],
)
def test_candidates_that_cannot_be_used_are_named(tmp_path: Path, lines: str | None, said: str) -> None:
    if lines is not None:
        (tmp_path / "c.jsonl").write_text(lines)
    found = qdpo("label", "c.jsonl", "--no-open", cwd=tmp_path)
    assert found.returncode == 3 and said in found.stderr and not (tmp_path / "pairs.jsonl").exists()
