"""A stand-in for a judge's server: it speaks HTTP, counts what it is asked, and behaves as its script says."""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | dict[str, Any] | tuple[int, Any, dict[str, str]] | None
"""The judge's text; a whole body; status, body and headers; None breaks the connection off."""
Script = Callable[["Asked"], Reply]
ANSWER = re.compile(r"\[ANSWER ([AB]) (\w+) begins\]\n(.*?)\n\[ANSWER \1 \2 ends\]", re.DOTALL)


class Asked:
    """One request as the server got it."""

    def __init__(self, number: int, headers: dict[str, str], body: dict[str, Any]):
        self.number, self.headers, self.body = number, headers, body
        self.messages: list[dict[str, str]] = body["messages"]
        shown = {letter: text for letter, _mark, text in ANSWER.findall(self.messages[0]["content"])}
        self.first, self.second = shown["A"], shown["B"]


def prefers(better: Callable[[str], Any]) -> Script:
    """A judge with a taste of its own, wherever an answer is shown: higher is better."""

    def script(asked: Asked) -> str:
        first, second = better(asked.first), better(asked.second)
        return f"VERDICT: {'TIE' if first == second else 'A' if first > second else 'B'}"

    return script


class JudgeServer:
    """Serves on a port of its own until it is closed; `asked` holds all requests in the order in which they came."""

    def __init__(self, script: Script):
        self.script, self.asked, lock = script, list[Asked](), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked = Asked(len(outer.asked), dict(self.headers), body)
                    outer.asked.append(asked)
                reply = outer.script(asked)
                if reply is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
                if isinstance(content, str) and status == 200:
                    message = {"role": "assistant", "content": content}
                    content = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                encoded = (content if isinstance(content, str) else json.dumps(content)).encode()
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(encoded))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(encoded)
                except OSError:  # the one who asked has given up
                    self.close_connection = True

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def pairs_asked(self) -> list[tuple[str, str]]:
        """The answers of each request, first and second."""
        return [(each.first, each.second) for each in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def slow(seconds: float, script: Script) -> Script:
    def script_(asked: Asked) -> Reply:
        time.sleep(seconds)
        return script(asked)

    return script_
