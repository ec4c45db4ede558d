"""A server that answers a judge's question with bytes of its own choosing, and the ways in which it can be hostile."""

import contextlib
import functools
import gzip
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

Act = Callable[[socket.socket], None]
"""What the server does on a connection once it has read the question."""
CODES = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\u202edrow\u202c", "a\rb", "\x08\x08", "\x85", "\x7f"]
STOP_S = 40.0


class HostileServer:
    """Does one thing on every connection until it is closed."""

    def __init__(self, act: Act, *, reads: bool = True):
        self._act, self._reads, self._listener = act, reads, socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            while True:
                if self._reads and not read_request(connection):
                    return
                self._act(connection)
                if not self._reads:
                    return

    def close(self) -> None:
        self._listener.close()


def read_request(connection: socket.socket) -> bytes:
    """The headers and the body of a request; empty once the other side has closed."""
    read = b""
    while b"\r\n\r\n" not in read:
        if not (piece := connection.recv(65536)):
            return b""
        read += piece
    head, _, body = read.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", b"0")):
        body += connection.recv(65536)
    return read


def spoken(content: Any = "VERDICT: A", **others: Any) -> dict[str, Any]:
    """A judge's answer as it should be."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            **others}  # fmt: skip


def http(body: Any, status: str = "200 OK", *headers: str, length: str | None = "") -> bytes:
    """An answer; a body that is neither bytes nor text is sent as JSON. `length=None`: none is stated."""
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length or len(content)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + content


def send(*pieces: bytes) -> Act:
    """Sends these and keeps the connection."""

    def act(connection: socket.socket) -> None:
        connection.sendall(b"".join(pieces))

    return act


def send_and_close(*pieces: bytes, reset: bool = False) -> Act:
    """Sends these and closes."""

    def act(connection: socket.socket) -> None:
        connection.sendall(b"".join(pieces))
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    return act


def endless(first: bytes, piece: bytes, *, every_s: float = 0.0) -> Act:
    """Sends `first`, then `piece` over and over."""

    def act(connection: socket.socket) -> None:
        connection.sendall(first)
        begun = time.monotonic()
        while time.monotonic() - begun < STOP_S:
            connection.sendall(piece)
            if every_s:
                time.sleep(every_s)

    return act


def silent(connection: socket.socket) -> None:
    """Says nothing."""
    connection.settimeout(STOP_S)
    with contextlib.suppress(TimeoutError):
        connection.recv(1)


@functools.cache
def _zeros() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(32)) + packer.flush()


def bomb(mib: int, layers: int = 1) -> bytes:
    """Zeros, packed."""
    packed = _zeros() * (mib // 32)
    for _ in range(layers - 1):
        packed = gzip.compress(packed)
    return packed


def deep(depth: int, opening: str = "[", closing: str = "]", middle: str = "1") -> str:
    return opening * depth + middle + closing * depth


def chunked(*lines: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + b"".join(lines)


def odd_value(rng: random.Random) -> Any:
    """A value of some type, which is rarely the one that is wanted."""
    odd = [None, True, 0, -1, 10**30, 1e308, "", "x" * 5000, [], {}, [[]], {"a": []}, ["VERDICT: A"], [None, 3, {}],
           {"text": 3}, [{"type": "text", "text": [1]}], "\ud800", "\x00", *CODES]  # fmt: skip
    return rng.choice(odd)


def endless_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """Answers that do not end, or are too long, each for another part of an answer."""
    ok, block = b"HTTP/1.1 200 OK\r\n", b"x" * 2**16
    for every_s, how in ((0.0, "fast"), (rng.choice([0.05, 0.2, 0.4]), "slow")):
        small = every_s > 0
        yield f"endless headers, {how}", endless(ok, b"X: y\r\n", every_s=every_s)
        yield f"endless status line, {how}", endless(b"HTTP/1.1 200 ", b"x" if small else block, every_s=every_s)
        yield f"endless header line, {how}", endless(ok + b"X: ", b"x" if small else block, every_s=every_s)
        yield f"endless body, {how}", endless(ok + b"\r\n", b" " if small else block, every_s=every_s)
        yield f"endless continue, {how}", endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", every_s=every_s)
        yield f"endless chunks, {how}", endless(chunked(), b"1\r\nx\r\n", every_s=every_s)
        yield f"endless chunk size, {how}", endless(chunked(), b"0" if small else b"0" * 2**16, every_s=every_s)
        yield f"endless trailers, {how}", endless(chunked(b"0\r\n"), b"X: y\r\n", every_s=every_s)
    yield "chunk of a size below zero", endless(chunked(b"-1\r\n"), block)
    yield "a body of 1 GB", endless(http(b"", length=str(2**30)), block)
    yield "a body of 1 GB in an error", endless(http(b"", "500 No", length=str(2**30)), block)
    yield "a body of 1 GB in a redirect", endless(http(b"", "302 No", "Location: /v2", length=str(2**30)), block)
    yield "silence", silent


def packed_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """Packed answers; a judge asks for none."""
    for coding, body in (
        ("gzip", bomb(8192)), ("gzip, gzip", bomb(8192, 2)), ("gzip, gzip, gzip", bomb(8192, 3)), ("deflate", bomb(64)),
        ("gzip", b"rubbish"), ("br", rng.randbytes(99)), ("zstd", rng.randbytes(99)), ("gzip", bomb(32)[:99]),
        ("\x1b[31m", b"x"), ("GZIP", bomb(64)),
    ):  # fmt: skip
        for status in ("200 OK", "302 Found"):
            yield (
                f"{status} packed as {coding!r}, {len(body)} bytes",
                send(http(body, status, f"Content-Encoding: {coding}", "Location: /v2")),
            )


def broken_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """Answers that break HTTP's rules, or break off."""
    good = http(spoken())
    yield "closed at once", send_and_close()
    yield "reset at once", send_and_close(reset=True)
    for _ in range(6):
        place = rng.randrange(1, len(good))
        yield f"cut after {place} bytes", send_and_close(good[:place], reset=rng.random() < 0.5)
    for number in range(8):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        yield f"bits flipped, {number}", send_and_close(bytes(damaged))
    yield "random bytes", send_and_close(rng.randbytes(rng.randint(10, 3000)))
    for length in ("-1", "9" * 5000, "abc", "1, 2", "0", "1e3", "+5", str(2**63), "0x10", ""):
        yield f"content length {length[:9]!r}", send_and_close(http(spoken(), length=length or " "))
    for size in (b"zz", b"", b"-5", b"f" * 40, b"9" * 5000, b"1;" + b"x" * 9999, b"\x00", b"0x5"):
        yield f"chunk size {size[:9]!r}", send_and_close(chunked(size, b"\r\nhello\r\n0\r\n\r\n"))
    for status in (
        "99 Low",
        "1000 High",
        "-1 No",
        "abc",
        "",
        "204 Nothing",
        "101 Switch",
        "304 Same",
        "226 IM",
        "999 X",
    ):
        yield f"status {status!r}", send_and_close(http(spoken(), status))
    yield "another protocol", send_and_close(b"SSH-2.0-OpenSSH_9.9\r\n")
    yield "header without a colon", send_and_close(http(spoken(), "200 OK", "rubbish", "\x00: \x00"))
    yield "a thousand headers", send_and_close(http(spoken(), "200 OK", *(f"X-{n}: y" for n in range(1000))))
    yield (
        "an odd cookie",
        send(http(spoken(), "200 OK", "Set-Cookie: a=b; expires=99999999999999; max-age=" + "9" * 5000)),
    )
    yield "an odd charset", send(http(spoken(), "200 OK", "Content-Type: application/json; charset=\x1b[31m"))


def worded_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """Answers in sound HTTP whose words are not what a judge says."""
    for status in ("200 OK", "400 Bad Request", "429 Slow", "500 Broken"):
        for depth in (50, 990, 100_000):
            yield f"{status}: deep lists, {depth}", send(http(deep(depth), status))
        yield f"{status}: deep error", send(http('{"error": ' + deep(5000, '{"message":', "}") + "}", status))
        yield f"{status}: no JSON", send(http(rng.choice(["<html>", "", "nul", "{", '{"a": 1']), status))
        yield f"{status}: no UTF-8", send(http(b"\xff\xfe" + rng.randbytes(40), status))
        yield f"{status}: a number of 5000 digits", send(http("9" * 5000, status))
        for field in ("message", "param", "code", "type"):
            error = {"message": "m", "param": None, "code": None, "type": "t"} | {field: odd_value(rng)}
            yield f"{status}: odd {field} in the error", send(http({"error": error}, status))
        yield f"{status}: odd error", send(http({"error": odd_value(rng)}, status))
        yield (
            f"{status}: codes, {status}",
            send(http({"error": {"message": rng.choice(CODES)}}, status + rng.choice(CODES)[:1])),
        )
    yield "the same field refused for ever", send(http({"error": {"param": "temperature"}}, "400 Bad"))
    yield "another field refused for ever", send(http({"error": {"param": "max_tokens"}}, "400 Bad"))
    for place in ("choices", "choice", "message", "content", "finish_reason"):
        for number in range(3):
            yield f"odd {place}, {number}", send(http(misshapen(place, odd_value(rng))))
    for text in ("x" * 2**20, " " * 2**20, "verdict " * 10**5, "VERDICT: A VERDICT: B", "<think>" * 10**5, *CODES):
        yield f"says {text[:12]!r}", send(http(spoken(text)))


def misshapen(place: str, value: Any) -> dict[str, Any]:
    """A judge's answer with one odd part."""
    answer = spoken()
    choice = answer["choices"][0]
    if place == "choices":
        answer["choices"] = value
    elif place == "choice":
        answer["choices"] = [value]
    elif place == "content":
        choice["message"]["content"] = value
    else:
        choice[place] = value
    return answer


def pointing_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """Redirects, and requests to wait."""
    targets = ["/v1/chat/completions", "http://example.invalid/v1", "file:///etc/passwd", "javascript:x", "http://[",
               "", "//", "http://\x1b[31m", "ftp://x", "http://127.0.0.1:99999999/", "x" * 9000, "\x00"]  # fmt: skip
    for target in targets:
        status = rng.choice(["301 M", "302 F", "303 S", "307 T", "308 P", "300 C", "399 X"])
        yield f"redirect to {target[:20]!r}", send(http(b"", status, f"Location: {target}"))
    yield "redirect without a place", send(http(b"", "302 Found"))
    waits = ["9" * 5000, "-1", "-" + "9" * 30, "nan", "inf", "1e9", "99999999", "Fri, 31 Dec 9999 23:59:59 GMT",
             "Mon, 99 Foo 0000 99:99:99", "\x1b[31m", "", "0", "0.001", "soon"]  # fmt: skip
    for wait in waits:
        yield (
            f"wait {wait[:12]!r}",
            send(http(b"busy", rng.choice(["429 S", "503 B", "413 L"]), f"Retry-After: {wait}")),
        )
    for status in ("401 No", "402 Pay", "403 No", "404 No", "405 No", "500 Bad", "503 Busy", "529 Full"):
        yield f"always {status}", send(http({"error": {"message": "no"}}, status))


def acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """All ways to be hostile."""
    for group in (endless_acts, packed_acts, broken_acts, worded_acts, pointing_acts):
        yield from group(rng)


def tls_acts(rng: random.Random) -> Iterator[tuple[str, Act]]:
    """What a server says where TLS is expected."""
    yield "plain HTTP", send_and_close(http(spoken()))
    yield "random bytes", send_and_close(rng.randbytes(200))
    yield "an alert", send_and_close(b"\x15\x03\x03\x00\x02\x02\x28")
    yield "half a record", endless(b"\x16\x03\x03\x40\x00", b"\x02", every_s=0.1)
    yield "endless records", endless(b"", b"\x16\x03\x03\x00\x04\x02\x00\x00\x00")
    yield "silence", silent
    yield "closed at once", send_and_close()
