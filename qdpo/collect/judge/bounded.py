"""An HTTP transport that bounds a whole answer, headers included: its bytes, and the time from request to last byte.

The timeout of a socket begins again with every byte, and http.client reads some lines of a chunked answer without a
bound. So both bounds are kept below it, where bytes enter.
"""

import http.client
import io
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import ConnectionPool, HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

LARGEST_ANSWER = 16 * 2**20
"""Bytes of an answer with its headers; a verdict with long thoughts has some hundred thousand."""
BLOCK = 2**16
LONGEST_WAIT_S = 300
"""Longest Retry-After of a server that is waited for."""
# What requests, urllib3 and http.client raise for answers that break HTTP's rules; ValueError for odd numbers and text.
BROKEN = (requests.RequestException, HTTPError, http.client.HTTPException, OSError, ValueError)


class OverBound(Exception):
    """An answer is too long or too slow; not an OSError, which urllib3 would try again. The message is a reason."""


@dataclass(frozen=True)
class Received:
    """A whole answer of a server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


class _Terms(threading.local):
    """The time bound of this thread's answers, in seconds."""

    timeout_s: float = 120.0


_terms = _Terms()


class _Metered(io.RawIOBase):
    """The bytes of a socket, counted and timed."""

    def __init__(self, sock: Any):
        self._sock, self._inner = sock, sock.makefile("rb", buffering=0)
        self._timeout_s = _terms.timeout_s
        self._until, self._count = time.monotonic() + self._timeout_s, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise OverBound(f"the answer was not whole within {self._timeout_s:g} s (--timeout)")
        self._sock.settimeout(left)
        try:
            read: int = self._inner.readinto(into)
            self._sock.settimeout(self._timeout_s)  # for the next request on this connection
        except TimeoutError:
            if not self._count:  # urllib3 knows what to do about a server that says nothing
                raise
            raise OverBound(f"the answer was not whole within {self._timeout_s:g} s (--timeout)") from None
        self._count += read
        if self._count > LARGEST_ANSWER:
            raise OverBound(f"the answer is longer than {LARGEST_ANSWER // 2**20} MiB")
        return read

    def close(self) -> None:
        self._inner.close()
        super().close()


class _MeteredSocket:
    """The part of a socket that http.client uses to read an answer."""

    def __init__(self, sock: Any):
        self._sock = sock

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Metered(self._sock), BLOCK)


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **options: Any):
        super().__init__(_MeteredSocket(sock), *arguments, **options)  # type: ignore[arg-type]


class _Http(HTTPConnection):
    response_class = _BoundedResponse


class _Https(HTTPSConnection):
    response_class = _BoundedResponse


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class BoundedAdapter(HTTPAdapter):
    """A transport of requests with bounded answers, also through a proxy."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        return manager


class DirectSession(requests.Session):
    """A session that leaves redirects alone; requests would read, unpack and parse them even if it may not follow."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No target."""


class PatientRetry(Retry):
    """Retries until a moment; a server that asks for a longer wait is not waited for, and its answer counts."""

    until: float = float("inf")

    def new(self, **changed: Any) -> "PatientRetry":
        made = super().new(**changed)
        made.until = self.until
        return made

    def parse_retry_after(self, retry_after: str) -> float:
        """Seconds to wait; 0, which means the usual pause, where the header is not a number of seconds or a date."""
        try:
            return super().parse_retry_after(retry_after.strip()[:64])
        except (ValueError, LookupError, OverflowError, TypeError, HTTPError):
            return 0.0

    def increment(
        self, method: str | None = None, url: str | None = None, response: BaseHTTPResponse | None = None,
        error: Exception | None = None, _pool: ConnectionPool | None = None, _stacktrace: Any = None,
    ) -> "PatientRetry":  # fmt: skip
        """The next state. Raises: MaxRetryError where it is the last, or the pause before it would be too long."""
        found = super().increment(method, url, response, error, _pool, _stacktrace)
        pause = (response is not None and self.get_retry_after(response)) or found.get_backoff_time()
        if pause > LONGEST_WAIT_S or time.monotonic() + pause > self.until:
            return self.new(total=-1).increment(method, url, response, error, _pool, _stacktrace)
        return found


def read_body(response: requests.Response) -> bytes:
    """The whole body, unpacked within the same bound. Raises: OverBound, and what BROKEN names."""
    pieces = []
    while piece := response.raw.read(BLOCK, decode_content=False):
        pieces.append(piece)
    body = b"".join(pieces)
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip", "deflate"):  # the request asks for no packing at all
        raise OverBound("the answer is packed in a way that was not asked for (Content-Encoding)")
    try:
        unpacked = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, LARGEST_ANSWER + 1)
    except zlib.error:
        raise OverBound("the answer is packed, and damaged (Content-Encoding)") from None
    if len(unpacked) > LARGEST_ANSWER:
        raise OverBound(f"the answer is longer than {LARGEST_ANSWER // 2**20} MiB")
    return unpacked


def bound_answers(timeout_s: float) -> None:
    """Set the time within which each answer to this thread must be whole."""
    _terms.timeout_s = timeout_s
