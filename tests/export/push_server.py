"""A Hugging Face hub on the loopback interface that takes uploads: `hub_server` gives, this one receives.

    with PushServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment})
    hub.repos["ada/model"].files["README.md"]

Answers what `create_repo`, `repo_info` and `create_commit` of huggingface_hub ask, with LFS's "basic" transfer for
large and safetensors files. Everything received is kept: `received` holds every request's bytes.
"""

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

ACCOUNT, TOKEN = "ada", "hf_loopbackupload"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Pushed:
    """A repository and its one commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class PushServer:
    """The hub; `received` lists (method, path, body) of every request. With `down`, it answers 503 to all."""

    def __init__(self) -> None:
        self.repos: dict[str, Pushed] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[tuple[str, str, bytes]] = []
        self.down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a client with write access; Xet has a protocol of its own, which is not spoken here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: PushServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.received.append((self.command, self.path, body))
        if self.hub.down:
            return self._answer(503, {"error": "down"})
        if path.startswith("/lfs/"):  # the address of an upload is its permission
            self.hub.objects[path.removeprefix("/lfs/")] = body
            return self._answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid user token"})
        for pattern, answer in self.ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, **match.groupdict())
        return self._answer(404, {"error": f"no answer for {self.command} {path}"})

    do_GET = do_PUT = do_POST

    def whoami(self, _body: bytes) -> None:
        self._answer(200, {"name": ACCOUNT, "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or ACCOUNT
        name = f"{owner}/{asked['name']}"
        if owner != ACCOUNT:
            self._answer(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
        elif name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.repos[name] = Pushed(private=asked.get("visibility") == "private" or asked.get("private") is True)
            self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, _body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        private = self.hub.repos[repo].private
        times = {"createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z"}
        content = {"_id": "0", "id": repo, "private": private, "sha": "0" * 40, "siblings": [], "tags": [], **times}
        self._answer(200, content)

    def validate(self, _body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10**7 else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, repo: str) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value: dict[str, Any] = entry["value"]
            if entry["key"] == "file":
                self.hub.repos[repo].files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo].files[value["path"]] = self.hub.objects[value["oid"]]
        oid = "1" * 40
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    ROUTES = {
        r"GET /api/whoami-v2": whoami,
        r"POST /api/repos/create": create,
        rf"GET /api/models/{REPO}": info,
        r"POST /api/validate-yaml": validate,
        rf"POST /api/models/{REPO}/preupload/main": preupload,
        rf"POST /{REPO}\.git/info/lfs/objects/batch": batch,
        rf"POST /api/models/{REPO}/commit/main": commit,
    }

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent: `received` is the log."""
