"""A Hugging Face hub on the loopback interface: serves folders as huggingface_hub and datasets ask for them, no more.

    with HubServer(folder, gated={"org/closed"}) as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url})

`folder` holds `models/OWNER/NAME/…` and `datasets/OWNER/NAME/…`, read anew at every request. A repository has one
commit at a time, the SHA-1 over its files, which `main` stands for. As on the real hub, anyone may see what a gated
repository holds, but its files need a token that was given access (TOKEN).
"""

import functools
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Set
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".parquet", ".gguf", ".bin")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?"
)
FILE = re.compile(r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Refusal(Exception):
    """An error response; `code` is what the client library goes by."""

    def __init__(self, status: int, code: str, commit: str | None = None):
        super().__init__(code)
        self.status, self.code, self.commit = status, code, commit


@functools.cache
def _hashes(path: Path, size: int, modified_ns: int) -> tuple[str, str]:
    """(git blob id, SHA-256) of a file; size and time are in the key, so that a changed file is hashed again."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Repo:
    """One repository as it is on disk now."""

    kind: str
    name: str
    folder: Path

    def files(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    @property
    def commit(self) -> str:
        tree = "".join(f"{self._hashes(path)[0]} {name}\n" for name, path in self.files().items())
        return hashlib.sha1(tree.encode()).hexdigest()

    def etag(self, path: Path) -> str:
        return self._hashes(path)[path.name.endswith(LFS_SUFFIXES)]

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        """A file as `tree` and `paths-info` list it."""
        oid, sha256 = self._hashes(path)
        size = path.stat().st_size
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if name.endswith(LFS_SUFFIXES) else {}
        return {"type": "file", "path": name, "size": size, "oid": oid, **lfs}

    def info(self, *, gated: bool, with_sizes: bool) -> dict[str, Any]:
        siblings = []
        for name, path in self.files().items():
            entry = self.entry(name, path)
            sizes = {"size": entry["size"], "blobId": entry["oid"]} if with_sizes else {}
            siblings.append({"rfilename": name, **sizes})
        times = {"createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z"}
        counts: dict[str, Any] = {"downloads": 0, "likes": 0, "tags": [], "private": False, "disabled": False}
        who = {"_id": "0", "id": self.name, "modelId": self.name, "author": self.name.split("/")[0], "sha": self.commit}
        return {**who, **times, **counts, "gated": gated and "manual", "cardData": self._card(), "siblings": siblings}

    def _card(self) -> dict[str, Any] | None:
        readme = self.folder / "README.md"
        front_matter = (
            re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.S) if readme.is_file() else None
        )
        return yaml.safe_load(front_matter[1]) if front_matter else None

    @staticmethod
    def _hashes(path: Path) -> tuple[str, str]:
        stat = path.stat()
        return _hashes(path, stat.st_size, stat.st_mtime_ns)


class HubServer:
    """The hub; `requests` lists what it was asked, as "METHOD path", and `unknown` what it has no answer for.

    With `down` set, it answers everything with error 503.
    """

    def __init__(self, folder: Path, *, gated: Set[str] = frozenset()):
        self.folder, self.gated = folder, gated
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True  # kept-alive connections would hold up the end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, kind: str, name: str) -> Repo:
        folder = self.folder / kind / name
        if ".." in name or not folder.is_dir():
            raise Refusal(404, "RepoNotFound")
        return Repo(kind, name, folder)

    def commit(self, kind: str, name: str) -> str:
        """The commit that `main` of `kind` ("models", "datasets") and `name` stands for now."""
        return self.repo(kind, name).commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        try:
            if self.hub.down:
                raise Refusal(503, "ServiceUnavailable")
            if api := API.fullmatch(path):
                self._api(
                    self.hub.repo(api["kind"], unquote(api["repo"])), api["verb"], api["rest"], query | parse_qs(body)
                )
            elif file := FILE.fullmatch(path):
                repo = self.hub.repo(file["kind"] or "models", unquote(file["repo"]))
                self._file(repo, unquote(file["revision"]), unquote(file["file"]))
            else:
                self.hub.unknown.append(f"{self.command} {self.path}")
                raise Refusal(404, "NotFound")
        except Refusal as refusal:
            commit = {"X-Repo-Commit": refusal.commit} if refusal.commit else {}
            self._answer(refusal.status, b"", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code, **commit})

    do_HEAD = do_POST = do_GET

    def _api(self, repo: Repo, verb: str | None, rest: str | None, query: dict[str, list[str]]) -> None:
        revision, _, inside = (rest or "main").partition("/")
        self._require_revision(repo, unquote(revision))
        content: Any
        if verb == "tree":
            content = self._tree(repo, unquote(inside), recursive=query.get("recursive") in (["true"], ["True"], ["1"]))
        elif verb == "paths-info":
            content = self._paths_info(repo, query.get("paths", []))
        else:
            content = repo.info(gated=repo.name in self.hub.gated, with_sizes="blobs" in query)
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _tree(self, repo: Repo, inside: str, *, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{inside}/" if inside else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, path in repo.files().items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[name] = repo.entry(name, path)
        if inside and not entries:
            raise Refusal(404, "EntryNotFound", repo.commit)
        return list(entries.values())

    def _paths_info(self, repo: Repo, paths: list[str]) -> list[dict[str, Any]]:
        entries = {entry["path"]: entry for entry in self._tree(repo, "", recursive=True)}
        return [entries[path] for path in paths if path in entries]

    def _file(self, repo: Repo, revision: str, name: str) -> None:
        self._require_revision(repo, revision)
        if repo.name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(403, "GatedRepo")
        path = repo.files().get(name)
        if path is None:
            raise Refusal(404, "EntryNotFound", repo.commit)
        size = path.stat().st_size
        headers = {"ETag": f'"{repo.etag(path)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(wanted[1]), int(wanted[2] or size - 1)) if wanted else (0, size - 1)
        if wanted and start >= size:
            raise Refusal(416, "RangeNotSatisfiable", repo.commit)
        end = min(end, size - 1)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self._head(206 if wanted else 200, end - start + 1, headers)
        if self.command != "HEAD":
            with path.open("rb") as file:
                file.seek(start)
                if wanted:
                    self.wfile.write(file.read(end - start + 1))
                else:
                    shutil.copyfileobj(file, self.wfile)

    def _require_revision(self, repo: Repo, revision: str) -> None:
        if revision not in ("main", "refs/heads/main", repo.commit):
            raise Refusal(404, "RevisionNotFound")

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent: `requests` is the log."""
