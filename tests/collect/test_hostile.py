"""Hostile judge servers and hostile requests: one of each group; scripts/break walks all of them in processes."""

import random
import time
import tracemalloc
from collections.abc import Iterator
from threading import Thread

import pytest

from qdpo.collect.judge import bounded
from qdpo.collect.judge.server import Endpoint, NoAnswer, Server
from qdpo.collect.label.server import LabelServer
from qdpo.errors import QdpoError
from tests.collect.hostile import Act, HostileServer, acts, bomb, endless_acts, http, send, spoken
from tests.collect.test_server import made
from tests.faults.servers import Attack, _exchange, attacks, request

SMALL = 2**20


def asked(act: Act, timeout_s: float = 0.3) -> str:
    """Asks the server once; the reply, or why there is none."""
    server = HostileServer(act)
    try:
        client = Server(Endpoint(server.url, "127.0.0.1", None, None), "m", timeout_s=timeout_s, max_tokens=9,
                        backoff_s=0.001)  # fmt: skip
        return client.ask([{"role": "user", "content": "?"}]).text
    except (NoAnswer, QdpoError) as error:
        return f"refused: {error}"
    finally:
        server.close()


ENDLESS = dict(endless_acts(random.Random(0)))
OTHERS = {name: act for name, act in acts(random.Random(0)) if name not in ENDLESS}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_end_is_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LARGEST_ANSWER", SMALL)
    begun = time.monotonic()
    tracemalloc.start()
    assert asked(ENDLESS[name]).startswith("refused: ")
    assert tracemalloc.get_traced_memory()[1] < 16 * SMALL and time.monotonic() - begun < 5
    tracemalloc.stop()


def test_nothing_that_a_server_says_is_a_bug_of_ours() -> None:
    """All other answers: each is a reply or a refusal, within a few time-outs."""
    said = [name for name in OTHERS if "packed" not in name or "8354560" not in name]
    for name in random.Random(1).sample(said, 60):
        begun = time.monotonic()
        asked(OTHERS[name])
        assert time.monotonic() - begun < 5, name


def test_a_packed_answer_is_bounded_and_else_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip
    import json

    packed = gzip.compress(json.dumps(spoken("VERDICT: B")).encode())
    assert asked(send(http(packed, "200 OK", "Content-Encoding: gzip"))) == "VERDICT: B"
    monkeypatch.setattr(bounded, "LARGEST_ANSWER", SMALL)
    assert "longer than" in asked(send(http(bomb(32), "200 OK", "Content-Encoding: gzip")))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelServer]:
    with LabelServer(made(tmp_path_factory.mktemp("page"))) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        server.token = "the-token-of-this-page-0123456789"
        yield server
        server.shutdown()


ATTACKS = [attack for attack in attacks(random.Random(0)) if attack.connections == 1 and attack.statuses]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_odd_request_is_answered(attack: Attack, page: LabelServer, capsys: pytest.CaptureFixture[str]) -> None:
    item = next(iter(page.labelling.decisions.items))
    answer = _exchange(page.server_port, attack.sent(page.server_port, item))
    status = int(answer.split()[1]) if answer.startswith(b"HTTP/") else 400
    assert status in attack.statuses, answer[:200]
    assert b"200 OK" in _exchange(page.server_port, request(page.server_port))[:20]
    shown = capsys.readouterr()
    assert not shown.out + shown.err


def test_a_request_that_does_not_end_is_closed(page: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("qdpo.collect.label.server.REQUEST_S", 0.3)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", page.server_port), timeout=5) as connection:
        try:
            for letter in "GET / HTTP/1.1\r\n" + "X: y\r\n" * 20:
                connection.sendall(letter.encode())
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - begun < 2
