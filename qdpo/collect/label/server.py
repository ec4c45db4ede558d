"""The label page's server: reachable only from this machine, protected by a token against other sites.

Any web page can send requests to 127.0.0.1, also under a host name of its own that resolves there (DNS rebinding). So
every request must name this host, every request for data must carry the token, which only the printed address
contains, and every request that writes must come from this page itself (its Origin header).
"""

import io
import json
import os
import secrets
import socketserver
import sys
import threading
import time
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from qdpo.collect.label.sitting import Labelling, Overtaken
from qdpo.errors import ConfigError, DataError, QdpoError

HOST = "127.0.0.1"
PAGES = {
    "/": ("label.html", "text/html"),
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/view.js": ("view.js", "text/javascript"),
    "/server.js": ("server.js", "text/javascript"),
}
"""The only files served: a path from a request is never used as a file name."""
TOKEN_HEADER = "X-Qdpo-Token"
LARGEST_BODY = 4 * 1024 * 1024
MOST_CONNECTIONS = 128
REQUEST_S = 60
"""Seconds until a silent connection, or a request that does not end, is closed."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LabelServer(ThreadingHTTPServer):
    """Serves one labelling session to this machine."""

    request_queue_size = MOST_CONNECTIONS
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, labelling: Labelling, port: int = 0):
        """Port 0 takes any free port. Raises: ConfigError if the port cannot be used."""
        self.labelling, self.token = labelling, secrets.token_urlsafe(24)
        self._lock, self._connections = threading.Lock(), 0
        folder = resources.files("qdpo.collect.label") / "pages"
        self.pages = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()}
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"Port {port} (--port) cannot be used: {error.strerror or error}. Leave --port out to use a free port."
            ) from None

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own; above MOST_CONNECTIONS the connection is closed, and the page goes on."""
        with self._lock:
            self._connections += 1
            full = self._connections > MOST_CONNECTIONS
        if full:
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which makes room for another."""
        with self._lock:
            self._connections -= 1
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that break off; anything else is a bug, said in one line."""
        error = sys.exception()
        if isinstance(error, OSError):
            return
        if os.environ.get("QDPO_VERBOSE"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"qdpo label: a request failed by a bug in qdpo ({what}; -v shows more); please report it", file=sys.stderr
        )

    @property
    def address(self) -> str:
        """Address to open in a browser. The token is in the fragment, which browsers never send."""
        return f"http://{HOST}:{self.server_port}/#token={self.token}"

    @property
    def hosts(self) -> set[str]:
        """Allowed values of a request's Host header."""
        return {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class _Clock(io.RawIOBase):
    """The bytes of a connection, until a moment."""

    def __init__(self, connection: Any):
        self._connection, self._inner = connection, connection.makefile("rb", buffering=0)
        self.until = time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        read: int = self._inner.readinto(into)
        self._connection.settimeout(REQUEST_S)
        return read

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qdpo", ""
    timeout = REQUEST_S

    def setup(self) -> None:
        """Read through a clock: the timeout of a socket begins again with every byte."""
        super().setup()
        self._clock = _Clock(self.connection)
        self.rfile = io.BufferedReader(self._clock)

    def handle_one_request(self) -> None:
        self._clock.until = time.monotonic() + REQUEST_S
        super().handle_one_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses: a bad request line, headers without end, an unknown method."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        self._send_json({"error": f"This is not a request that the page makes ({status.phrase})."}, status)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Any) -> None:
        if self.command == "GET" and ("Content-Length" in self.headers or "Transfer-Encoding" in self.headers):
            self.close_connection = True  # a body that nobody reads would be taken for the next request
        try:
            self._check_sender()
            work()
        except _Refused as refused:
            self.close_connection = True  # the body, if any, is unread
            self._send_json({"error": str(refused)}, refused.status)
        except DataError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except QdpoError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INSUFFICIENT_STORAGE)

    def _check_sender(self) -> None:
        if self.request_version == "HTTP/0.9":
            raise _Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "This server speaks HTTP/1.1.")
        if len(self.headers.get_all("Host", [])) > 1 or self.headers.get("Host") not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost only.")
        origin = self.headers.get("Origin")
        if (origin is not None or self.command == "POST") and origin != f"http://{self.headers['Host']}":
            raise _Refused(HTTPStatus.FORBIDDEN, "Only the label page itself may ask this server.")

    def _check_token(self) -> None:
        if not secrets.compare_digest(self.headers.get(TOKEN_HEADER, "").encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "The token is not that of this server.")

    def _get(self) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:  # such as http://[
            raise _Refused(HTTPStatus.BAD_REQUEST, "This is not an address.") from None
        if self.path in self.server.pages:
            content, kind = self.server.pages[self.path]
            return self._send(content, kind)
        self._check_token()
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        labelling = self.server.labelling
        if url.path == "/api/index":
            return self._send_json(labelling.index())
        if url.path == "/api/item":
            return self._send_json(labelling.view(query.get("id", ""), again=query.get("again") == "1"))
        if url.path == "/api/search":
            return self._send_json(labelling.search(query.get("q", "")))
        raise _Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _post(self) -> None:
        self._check_token()
        if self.path != "/api/decide":
            raise _Refused(HTTPStatus.NOT_FOUND, "There is nothing here.")
        wish = self._body()
        try:
            self._send_json(self.server.labelling.decide(wish))
        except Overtaken:
            self._send_json(self.server.labelling.view(str(wish["prompt"])), HTTPStatus.CONFLICT)

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A decision is sent as application/json.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "A decision says how long it is (Content-Length).")
        if len(length) > len(str(LARGEST_BODY)) or int(length) > LARGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A decision has at most {LARGEST_BODY:,} bytes.")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "This is not JSON.") from None
        if not isinstance(value, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "A decision is a JSON object.")
        return value

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal is for the user."""
