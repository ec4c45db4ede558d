"""The label page's server: what it refuses, and what it says about prompts and decisions."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qdpo.collect.candidates import Candidates, read_candidates
from qdpo.collect.decisions import Decision, Decisions, journal_of
from qdpo.collect.label.habits import read_habits
from qdpo.collect.label.server import LARGEST_BODY, PAGES, LabelServer
from qdpo.collect.label.sitting import Labelling, LabelOptions
from qdpo.errors import ConfigError
from tests.conftest import qdpo, write_jsonl


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "answers": [{"text": f"{word} {n}", "cut": word == "bad", "from": {"model": word}}
                                                for word in ("good", "fair", "bad")]}
        for n in range(count)
    ]  # fmt: skip


def made(tmp_path: Path, count: int = 3, **options: Any) -> Labelling:
    items = read_candidates([write_jsonl(tmp_path / "candidates.jsonl", rows(count))]).items
    return Labelling(Decisions(tmp_path / "pairs.jsonl", items), LabelOptions(**options))


def items(labelling: Labelling) -> list[Candidates]:
    return list(labelling.decisions.items.values())


def wish(labelling: Labelling, number: int = 0, **others: Any) -> dict[str, Any]:
    item = items(labelling)[number]
    return {
        "prompt": item.id, "kind": "pick", "best": item.answers[0].id, "worst": item.answers[2].id, "seconds": 2,
        "count": labelling.decisions.count(item.id), **others,
    }  # fmt: skip


class Client:
    """Sends requests as a browser would, unless told otherwise."""

    def __init__(self, server: LabelServer):
        self.server, self.port = server, server.server_port
        self.labelling = server.labelling

    def ask(self, path: str, body: Any = None, **headers: str | None) -> tuple[int, Any, Any]:
        """Status, headers and body; a header of None is left out."""
        own = f"127.0.0.1:{self.port}"
        sent: dict[str, str | None] = {"Host": own, "X-Qdpo-Token": self.server.token}
        if body is not None:
            sent |= {"Origin": f"http://{own}", "Content-Type": "application/json"}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent["Content-Length"] = str(len(body))
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, content


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with LabelServer(made(tmp_path)) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield Client(server)
        server.shutdown()


def test_the_page_asks_and_is_answered(client: Client) -> None:
    status, headers, index = client.ask("/api/index")
    assert status == 200 and [row[1] for row in json.loads(index)["rows"]] == ["undecided"] * 3
    assert "Access-Control-Allow-Origin" not in headers
    status, _, content = client.ask("/api/decide", wish(client.labelling))
    assert status == 200 and json.loads(content)["row"][1:3] == ["pick", 1]
    assert json.loads(client.ask("/api/search?q=QUESTION%201")[2]) == [items(client.labelling)[1].id]


def test_files_are_a_fixed_list_and_hold_no_data(client: Client) -> None:
    for path in PAGES:
        status, headers, content = client.ask(path, X_Qdpo_Token=None)
        assert status == 200 and client.server.token not in content and "question" not in content.lower()
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/../server.py", "/..%2fserver.py", "/label.js/../../server.py", "/etc/passwd", "//etc/passwd", "/pairs.jsonl"],
)
def test_no_path_leaves_the_list(client: Client, path: str) -> None:
    assert client.ask(path)[0] == 404 and client.ask(path, X_Qdpo_Token=None)[0] == 401


@pytest.mark.parametrize("path", ["/", "/api/index"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "", None])
def test_another_host_is_refused(client: Client, host: str | None, path: str) -> None:
    """DNS rebinding: a foreign name that points to 127.0.0.1."""
    assert client.ask(path, Host=host)[0] == 403


def test_localhost_is_this_host_too(client: Client) -> None:
    assert client.ask("/api/index", Host=f"localhost:{client.port}")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X_Qdpo_Token": None}, 401),
        ({"X_Qdpo_Token": "wrong"}, 401),
        ({"X_Qdpo_Token": "ümlaut"}, 401),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": str(LARGEST_BODY + 1)}, 413),
    ],
)
def test_a_write_from_elsewhere_is_refused(client: Client, headers: dict[str, str | None], status: int) -> None:
    assert client.ask("/api/decide", wish(client.labelling), **headers)[0] == status
    assert not journal_of(client.labelling.decisions.out).exists()


def test_a_read_of_another_origin_is_refused(client: Client) -> None:
    assert client.ask("/api/index", Origin="http://evil.example")[0] == 403
    assert client.ask("/api/index", X_Qdpo_Token=None)[0] == 401


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "open"}, {"kind": "love"}, {"kind": "undo"}, {"again": True}, {"prompt": "x"}, {"prompt": 3},
        {"best": "x"}, {"worst": None}, {"seconds": -1}, {"seconds": float("nan")}, {"count": None}, {"note": None},
        {"note": "\ud83d"}, {"kind": "edit", "text": ""}, {"kind": "edit", "text": "\ud83d"},
        {"kind": "edit", "text": "bad 0"},
    ],
)  # fmt: skip
def test_a_decision_that_means_nothing_is_refused(client: Client, change: dict[str, Any]) -> None:
    status, _, content = client.ask("/api/decide", wish(client.labelling) | change)
    assert status == 400 and json.loads(content)["error"]
    assert not journal_of(client.labelling.decisions.out).exists()


@pytest.mark.parametrize("body", [b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_body_that_is_no_object_is_refused(client: Client, body: bytes) -> None:
    assert client.ask("/api/decide", body)[0] == 400


def test_a_stale_view_overwrites_nothing(client: Client) -> None:
    stale = wish(client.labelling, best=items(client.labelling)[0].answers[1].id)
    client.ask("/api/decide", wish(client.labelling))
    status, _, content = client.ask("/api/decide", stale)
    assert status == 409 and json.loads(content)["decision"]["best"] == items(client.labelling)[0].answers[0].id
    assert len(client.labelling.decisions.history) == 1


def test_many_at_once_are_taken_one_by_one(client: Client) -> None:
    """Of 16 tabs that decide the same prompt at the same time, one is taken."""
    sent, statuses = wish(client.labelling), list[int]()
    threads = [Thread(target=lambda: statuses.append(client.ask("/api/decide", sent)[0])) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 15 and len(client.labelling.decisions.history) == 1


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"Port \d+ \(--port\) cannot be used.*Leave --port out"):
            LabelServer(made(tmp_path), other.getsockname()[1])


def test_blind_hides_the_models_in_every_answer(tmp_path: Path) -> None:
    for blind in (False, True):
        labelling = made(tmp_path, is_blind=blind)
        said = labelling.view(items(labelling)[0].id)
        assert [("model" in answer) for answer in said["answers"]] == [not blind] * 3
        assert blind is not any(answer.get("model") == "fair" for answer in said["answers"])
        assert [answer["cut"] for answer in said["answers"] if answer["text"] == "bad 0"] == [True]


def test_the_order_of_answers_is_random_and_stays(tmp_path: Path) -> None:
    labelling = made(tmp_path, 300)
    orders = [labelling.order(item.id) for item in items(labelling)]
    firsts = [item.answers[0].id == order[0] for item, order in zip(items(labelling), orders, strict=True)]
    assert 70 < sum(firsts) < 130 and orders == [labelling.order(item.id) for item in items(labelling)]
    assert all(
        labelling.order(item.id, again=True) != order for item, order in zip(items(labelling), orders, strict=True)
    )
    labelling.decide(wish(labelling))
    assert labelling.decisions.history[0].shown == tuple(orders[0])


def test_one_pick_in_twenty_is_asked_again_later(tmp_path: Path) -> None:
    labelling = made(tmp_path, 60, agreement=True)
    asked = []
    for number in range(60):
        said = labelling.decide(wish(labelling, number))
        if prompt := said["again"]:
            newest = {one.prompt for one in labelling.decisions.history[-10:]}
            place = [item.id for item in items(labelling)].index(prompt)
            swapped = {"best": wish(labelling, place)["worst"], "worst": wish(labelling, place)["best"]}
            said = labelling.decide(wish(labelling, place, again=True) | (swapped if len(asked) == 1 else {}))
            assert prompt not in newest and said["again"] is None
            asked.append(prompt)
    habits = read_habits(labelling.decisions.history)
    assert len(set(asked)) == 3 and (habits.agreed, habits.asked_again) == (2, 3)
    assert len(list(labelling.decisions.pairs())) == 60 and all(
        p["chosen"][:4] == "good" for p in labelling.decisions.pairs()
    )
    assert "agreement with yourself: 2 of 3 (67%)" in labelling.summary()


def test_the_newest_picks_are_not_asked_again(tmp_path: Path) -> None:
    decisions = made(tmp_path, 22).decisions
    for number in range(20):
        said = Labelling(decisions, LabelOptions(agreement=True)).decide(
            wish(Labelling(decisions, LabelOptions()), number)
        )
    assert said["again"]
    newest = {one.prompt for one in decisions.history[-10:]}
    for seed in range(12):
        labelling = Labelling(decisions, LabelOptions(agreement=True, seed=seed))
        assert labelling.index()["again"] in set(decisions.items) - newest


def test_one_pick_is_asked_again_where_there_are_few(tmp_path: Path) -> None:
    labelling = made(tmp_path, 2, agreement=True)
    assert labelling.decide(wish(labelling, 0))["again"] is None
    assert labelling.decide(wish(labelling, 1))["again"] in labelling.decisions.items


def picks(places: list[int], answers: int = 2) -> list[Decision]:
    shown = tuple("abcd"[:answers])
    return [Decision(prompt=str(n), kind="pick", best=shown[p], worst=shown[p - 1], shown=shown, seconds=n)
            for n, p in enumerate(places)]  # fmt: skip


def test_position_bias_is_told_where_it_is_notable_only() -> None:
    fair, leaning = read_habits(picks([0, 1] * 20)), read_habits(picks([0] * 18 + [1] * 2))
    assert [(place.share, place.chance) for place in fair.places] == [(0.5, 0.5)] * 2 and fair.hint == ""
    assert leaning.hint.startswith("Place 1 was picked 90% of the time; chance would be 50%")
    assert read_habits(picks([0] * 19)).places == [] and fair.median_seconds == 19.5
    four = read_habits(picks([0, 1, 2, 3] * 10, answers=4))
    assert [place.chance for place in four.places] == [0.25] * 4 and four.hint == ""


def test_label_says_what_is_wrong_with_its_files(tmp_path: Path) -> None:
    broken = tmp_path / "c.jsonl"
    broken.write_text('{"prompt": "p", "answers": ["a"')
    answer = qdpo("label", "c.jsonl", "--out", "p.jsonl", cwd=tmp_path)
    assert answer.returncode == 3 and "c.jsonl line 1 is not JSON" in answer.stderr
    assert not (tmp_path / "p.jsonl").exists()
