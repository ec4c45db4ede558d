"""Hostile servers that `judge` asks, and hostile requests to the page of `label`."""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.collect.hostile import CODES, Act, HostileServer, acts, deep, odd_value, tls_acts
from tests.faults.base import DONE, REFUSED, Case, Good

PORT = "PORT"
TOKEN = "the-token-of-this-page-0123456789"
TIMEOUT_S = "1.5"


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    seen = Counter[str]()
    for case in _cases(rng):
        seen[case.name] += 1
        yield replace(case, name=f"{case.name} ({seen[case.name]})") if seen[case.name] > 1 else case


def _cases(rng: random.Random) -> Iterator[Case]:
    for name, act in acts(rng):
        yield Case("servers", f"judge: {name}", _judge("http", rng), REFUSED | DONE, around=_serving(act))
    for name, act in tls_acts(rng):
        serving = _serving(act, reads=False)
        yield Case("servers", f"judge over TLS: {name}", _judge("https", rng), REFUSED, around=serving)
    for attack in attacks(rng):
        yield Case("servers", f"label: {attack.name}", _label, DONE, around=_attacking(attack))


def _candidates(folder: Path) -> str:
    rows = [{"prompt": f"q{n}", "answers": [f"one {n}", f"two {n}"]} for n in range(2)]
    (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "candidates.jsonl"


def _judge(scheme: str, rng: random.Random) -> Callable[[Path], list[str]]:
    parallel = str(rng.randint(1, 4))

    def make(folder: Path) -> list[str]:
        return [
            "judge", _candidates(folder), "--by", f"openai:{scheme}://127.0.0.1:{PORT}/v1", "--judge-model", "m",
            "--out", "pairs.jsonl", "--timeout", TIMEOUT_S, "--parallel", parallel,
        ]  # fmt: skip

    return make


def _serving(act: Act, *, reads: bool = True) -> Callable[[Path], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def around(_: Path) -> Iterator[None]:
        server = HostileServer(act, reads=reads)
        sys.argv = [word.replace(PORT, str(server.port)) for word in sys.argv]
        try:
            yield
        finally:
            server.close()

    return around


@dataclass(frozen=True)
class Attack:
    """Bytes for the label page, sent once or on many connections, and the statuses of which one must come back."""

    name: str
    sent: Callable[[int, str], bytes]
    """From the port and the id of a prompt."""
    statuses: tuple[int, ...] = ()
    """Empty: whatever comes, the page only has to live on."""
    connections: int = 1


def request(port: int, line: str = "GET / HTTP/1.1", body: bytes = b"", **headers: str | None) -> bytes:
    """A request as the page makes it, with changed headers; None leaves one out."""
    own = f"127.0.0.1:{port}"
    fields: dict[str, str | None] = {"Host": own, "X-Qdpo-Token": TOKEN, "Origin": f"http://{own}",
                                     "Content-Type": "application/json"}  # fmt: skip
    if body:
        fields["Content-Length"] = str(len(body))
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [line, *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def attacks(rng: random.Random) -> Iterator[Attack]:
    """Requests that the page does not make."""
    post, bad = "POST /api/decide HTTP/1.1", (400, 401, 403, 404, 405, 411, 413, 414, 415, 431, 505)

    def lines(line: str) -> Callable[[int, str], bytes]:
        return lambda port, _: request(port, line)

    def fields(line: str, body: bytes = b"{}", **headers: str | None) -> Callable[[int, str], bytes]:
        return lambda port, _: request(port, line, body, **headers)

    for path in ("http://[", "http://[::1", "//[", "http://]/", "/" + "x" * 70_000, "/\x00", "/\x1b[31m", "*", "?",
                 "/%", "/api/item?id=%ff", "/api/item?" + "a=b&" * 9000, "/../../etc/passwd", "x:y"):  # fmt: skip
        yield Attack(f"path {path[:24]!r}", lines(f"GET {path} HTTP/1.1"), bad)
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get", "\x1b[31m", "X" * 999):
        yield Attack(f"method {method[:9]!r}", lines(f"{method} / HTTP/1.1"), bad)
    for version in (
        "HTTP/9.9",
        "HTTP/0.9",
        "HTTP/1.1.1",
        "HTTP/x",
        "HTTP/" + "9" * 5000,
        "ICY",
        "HTTP/-1.1",
        "\x1b[2J",
    ):
        yield Attack(f"version {version[:9]!r}", lines(f"GET / {version}"), bad)
    for length in ("9" * 5000, "-1", "+5", "1e3", "0x10", "", " ", "5, 5", "\u0661", str(2**63), None, "1.0"):
        yield Attack(f"content length {(length or '')[:9]!r}", fields(post, Content_Length=length), bad)
    for host in ("evil.example", "", "[", "127.0.0.1", "127.0.0.1:1", "\x1b[31m", "x" * 9000, None):
        yield Attack(f"host {(host or 'none')[:12]!r}", fields("GET / HTTP/1.1", b"", Host=host), bad)
    yield Attack("two hosts", lambda port, _: request(port, "GET / HTTP/1.1\r\nHost: evil.example"), bad)
    yield Attack("a header of 100 kB", fields(post, X_Long="x" * 100_000), bad)
    yield Attack(
        "a thousand headers", lambda port, _: request(port, post + "".join(f"\r\nX-{n}: y" for n in range(999))), bad
    )
    yield Attack("an origin of its own", fields(post, Origin="null"), bad)
    yield Attack("chunks", fields(post, Transfer_Encoding="chunked"), bad)
    yield Attack("expects to go on", fields(post, Expect="100-continue"))
    bodies = [b"{", b"[]", deep(10**5).encode(), b"\xff", b"9" * 5000, b"null", b'{"a": 1e999}', rng.randbytes(300),
              deep(10**5, '{"a":', "}").encode(), b'"\\ud800"', b" " * 10**6]  # fmt: skip
    for body in bodies:
        yield Attack(f"body {body[:12]!r}, {len(body)} bytes", fields(post, body), (400,))
    for field in ("prompt", "kind", "best", "worst", "seconds", "count", "note", "again", "text"):
        value = odd_value(rng)

        def decide(port: int, prompt: str, field: str = field, value: Any = value) -> bytes:
            wish = {"prompt": prompt, "kind": "pick", "best": "x", "worst": "y", "seconds": 1, "count": 0, "note": ""}
            return request(port, post, json.dumps(wish | {field: value}).encode())

        yield Attack(f"a decision with an odd {field}", decide, (400, 409))
    whole = rng.randrange(5, 60)
    yield Attack("a cut request, held open", lambda port, _: request(port)[:whole], connections=rng.randint(1, 40))
    yield Attack("a body that does not come", fields(post, b"", Content_Length="999"), connections=rng.randint(1, 40))
    yield Attack("silent connections", lambda *_: b"", connections=rng.randint(100, 127))
    yield Attack("more connections than are answered", lambda *_: b"", connections=100)
    yield Attack("pipelined", lambda port, _: request(port) * 50, (200,))
    yield Attack("a body behind a GET", lambda port, _: request(port, body=b"GET /x HTTP/1.1\r\n\r\n"), (200,))
    yield Attack("TLS", lambda *_: b"\x16\x03\x01\x02\x00\x01\x00" + rng.randbytes(200))
    yield Attack("random bytes", lambda *_: rng.randbytes(500))
    yield Attack("codes", lambda port, _: request(port, f"GET /{rng.choice(CODES)} HTTP/1.1".replace("\r", "")), bad)


def _label(folder: Path) -> list[str]:
    return ["label", _candidates(folder), "--out", "pairs.jsonl", "--port", PORT]


def _attacking(attack: Attack) -> Callable[[Path], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def around(folder: Path) -> Iterator[None]:
        import secrets

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        sys.argv = [word.replace(PORT, str(port)) for word in sys.argv]
        secrets.token_urlsafe = lambda *_: TOKEN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_attack, args=(attack, port), daemon=True).start()
        yield

    return around


def _attack(attack: Attack, port: int) -> None:
    """Sends the attack, asks for the page as a browser would, and presses Ctrl-C; exit code 1 where either fails."""
    wrong, held = "", []
    try:
        _page(port, patient=True)
        prompt = json.loads(_exchange(port, request(port, "GET /api/index HTTP/1.1")).partition(b"\r\n\r\n")[2])[
            "rows"
        ][0][0]
        answer = b""
        for _ in range(attack.connections):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            with contextlib.suppress(OSError):
                held[-1].sendall(attack.sent(port, prompt))
            if attack.statuses:
                with contextlib.suppress(OSError):
                    answer = held[-1].recv(65536)
        status = int(answer.split()[1]) if answer.startswith(b"HTTP/") else 400 if answer.startswith(b"{") else 0
        if attack.statuses and answer and status not in attack.statuses:
            wrong = f"answered {status}"
        if attack.statuses == (400,) and not answer:
            wrong = "not answered"
        _page(port)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        print(f"wrong: {wrong}", flush=True)
        os._exit(1)
    os.kill(os.getpid(), signal.SIGINT)


def _page(port: int, *, patient: bool = False) -> None:
    """The page must come at once; `patient` waits until it is served at all."""
    for _ in range(200 if patient else 1):
        try:
            answer = _exchange(port, request(port))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    if b"200 OK" not in answer[:20]:
        raise ValueError(f"the page is gone: {answer[:60]!r}")


def _exchange(port: int, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        return b"".join(iter(lambda: connection.recv(65536), b""))
