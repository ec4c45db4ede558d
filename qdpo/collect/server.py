"""Serves the page of `qdpo label` to this machine alone, and to nobody who does not know this start's token.

A browser runs other people's pages beside this one. They cannot read the token, and must not reach the data by another
name (DNS rebinding: Host), from another page (cross-site requests: Origin) or with a form (content type).
"""

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from qdpo.collect.labelling import Labelling, Stale
from qdpo.errors import ConfigError, DataError, QdpoError

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Qdpo-Token"
FILES = {
    "/": ("label.html", "text/html"),
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
}
MOST_BYTES = 2**20
"""Longest request: an answer that a person writes."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """The page and its three requests: all prompts, one prompt, and a decision."""

    daemon_threads = True

    def __init__(self, labelling: Labelling, port: int = 0):
        """Binds 127.0.0.1:`port`; 0 takes a free one. Raises: ConfigError if the port is taken."""
        self.labelling, self.lock, self.token = labelling, Lock(), secrets.token_urlsafe(24)
        self.static = {path: (_page(name), kind) for path, (name, kind) in FILES.items()}
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port={port} of {HOST} cannot be used: {error}. Leave --port out to take a free one."
            ) from None

    @property
    def address(self) -> str:
        """What to open; the token stands behind #, which browsers do not send."""
        return f"http://{HOST}:{self.server_port}/#token={self.token}"

    @property
    def names(self) -> set[str]:
        """The names under which a browser may ask."""
        return {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qdpo", ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> tuple[bytes, str]:
        path = urlsplit(self.path)
        if path.path in self.server.static:
            return self.server.static[path.path]
        self._check_token()
        labelling = self.server.labelling
        if path.path == "/api/prompts":
            with self.server.lock:
                return _json({"prompts": labelling.index(), "stats": labelling.stats(), "last": labelling.last()})
        if path.path.startswith("/api/prompt/"):
            with self.server.lock:
                return _json(labelling.view(path.path.removeprefix("/api/prompt/"), again=path.query == "again"))
        raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _post(self) -> tuple[bytes, str]:
        self._check_token()
        if self.headers.get("Origin") not in {f"http://{name}" for name in self.server.names}:
            raise _Refused(HTTPStatus.FORBIDDEN, "Only the page itself may decide.")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Decisions are JSON.")
        asked = self._body()
        with self.server.lock:
            if self.path == "/api/search":
                return _json({"ids": self.server.labelling.search(str(asked.get("text", "")))})
            if self.path == "/api/decide":
                return _json(self.server.labelling.take(asked))
        raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request holds at most {MOST_BYTES:,} bytes.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "This is not JSON.") from None
        if not isinstance(asked, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "This is not a JSON object.")
        return asked

    def _check_token(self) -> None:
        given = self.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise _Refused(
                HTTPStatus.FORBIDDEN, "This page is of another start of `qdpo label`. Open the address it printed last."
            )

    def _answer(self, handle: Any) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            content, kind = handle()
        except _Refused as refused:
            status, (content, kind) = refused.status, _json({"error": str(refused)})
        except Stale as error:
            status, (content, kind) = HTTPStatus.CONFLICT, _json({"error": str(error)})
        except DataError as error:
            status, (content, kind) = HTTPStatus.BAD_REQUEST, _json({"error": str(error)})
        except QdpoError as error:
            status, (content, kind) = HTTPStatus.INSUFFICIENT_STORAGE, _json({"error": str(error)})
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        if status != HTTPStatus.OK:  # what was sent along may not have been read
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def _check_host(self) -> None:
        if self.headers.get("Host") not in self.server.names:
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "This page is served to 127.0.0.1 alone.")
        if self.headers.get("Origin", f"http://{HOST}:{self.server.server_port}") not in {
            f"http://{name}" for name in self.server.names
        }:
            raise _Refused(HTTPStatus.FORBIDDEN, "Another page may not ask.")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows the address, and requests are of no interest."""


def _page(name: str) -> bytes:
    return resources.files("qdpo.collect").joinpath("pages", name).read_bytes()


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, ensure_ascii=False).encode(), "application/json"
