"""Sends a question to an OpenAI-compatible server: key, retries, and a message for every failure."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.util.retry import RequestHistory

from qdpo.collect.judge.bounded import (
    BROKEN,
    BoundedAdapter,
    DirectSession,
    OverBound,
    PatientRetry,
    Received,
    bound_answers,
    read_body,
)
from qdpo.data.layouts.turns import Message, excerpt
from qdpo.errors import ConfigError

OWN_KEY, OPENAI_KEY, OPENAI_HOST = "QDPO_JUDGE_KEY", "OPENAI_API_KEY", "api.openai.com"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses that are retried. In the APIs that send them, 409 means a lock and 529 an overload."""
CONNECT_TIMEOUT_S = 10.0
PATIENCE = 5
"""A question, with all its retries and pauses, takes at most this many times --timeout and one answer more."""
SHOWN = 4096
"""Characters of an answer that are looked through for its words."""
ADAPTED = {"max_tokens": "max_completion_tokens", "temperature": None}
"""Fields that OpenAI's newer models refuse, with the field that replaces each, if any."""


class NoAnswer(Exception):
    """The server gave no usable answer to this question; `reason` is short, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TornReply(NoAnswer):
    """The connection broke in the middle of a reply; urllib3 does not retry once a reply has begun."""


@dataclass(frozen=True)
class Reply:
    """The model's reply (may be empty)."""

    text: str
    cut: bool
    """True if the reply was cut at the length limit."""


@dataclass(frozen=True)
class Endpoint:
    """Address of the server, and the key to send."""

    url: str
    """Base URL, including `/v1`."""
    host: str
    key: str | None
    key_from: str | None
    """The environment variable that held the key."""

    @property
    def warning(self) -> str | None:
        """Warning for the user if the key would be sent over plain http."""
        if self.key and self.url.startswith("http:") and not _is_here(self.host):
            return f"warning: {self.key_from} is sent to {self.host} over plain http, where others can read it"
        return None


def endpoint(url: str) -> Endpoint:
    """Parse the URL after `openai:`. OPENAI_API_KEY is sent only to OpenAI, QDPO_JUDGE_KEY to any server.

    Raises: ConfigError for a URL that is not an http address or contains a password, and for an invalid key.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # read here: urlsplit leaves a wrong one unread
    except ValueError as error:
        raise ConfigError(
            f"--by openai:URL is not an address: {error}. Write it as in `openai:http://localhost:8000/v1`."
        ) from None
    if "@" in parts.netloc or parts.query or parts.fragment:  # not echoed: it may be a secret
        raise ConfigError(
            f"--by openai:URL must not contain a password, ? or #. Put a key into the environment variable {OWN_KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--by openai:{url} is not an http address. Write it as in `openai:http://localhost:8000/v1`."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    sources = (OWN_KEY, OPENAI_KEY) if parts.hostname == OPENAI_HOST else (OWN_KEY,)
    source = next((name for name in sources if os.environ.get(name, "").strip()), None)
    key = os.environ[source].strip() if source else None
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{source} (from the environment) contains characters that no key has. Set it again.")
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path}", parts.hostname, key, source)


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Server:
    """Client of one model on a server. Thread-safe."""

    def __init__(self, where: Endpoint, model: str, *, timeout_s: float, max_tokens: int, backoff_s: float = 1.0):
        self.where, self.model = where, model
        self.retried = Counter[str]()
        """Number of retried requests, by cause."""
        self.say: Callable[[str], None] = lambda line: None
        self._timeout = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self._retry = PatientRetry(
            total=6, connect=3, read=2, other=3, status=6, redirect=0, allowed_methods=None, status_forcelist=RETRIED,
            backoff_factor=backoff_s, backoff_max=60, backoff_jitter=backoff_s, raise_on_status=False,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._local = threading.local()

    def ask(self, messages: list[Message]) -> Reply:
        """The model's answer at temperature 0.

        Raises: NoAnswer for a failure of this question; TornReply if it may be asked again at once; ConfigError for a
        failure that would affect every question.
        """
        while True:
            options = dict(self._options)
            response = self._post({"model": self.model, "messages": messages, **options})
            if response.status == HTTPStatus.BAD_REQUEST and self._adapt(response, options):
                continue
            self._check(response)
            return _reply(response)

    def _post(self, payload: dict[str, Any]) -> Received:
        bound_answers(self._timeout[1])
        try:
            # Redirects are not followed: they could send question and key elsewhere.
            response = self._session().post(
                f"{self.where.url}/chat/completions", json=payload, timeout=self._timeout, allow_redirects=False,
                stream=True, headers={"Accept-Encoding": "identity"},
            )  # fmt: skip
        except OverBound as error:
            raise NoAnswer(str(error)) from None
        except BROKEN as error:
            raise NoAnswer(_failure(error, self._timeout[1])) from None
        with response:
            try:
                body = read_body(response)
            except OverBound as error:
                raise NoAnswer(str(error)) from None
            except BROKEN as error:
                raise TornReply(_failure(error, self._timeout[1])) from None
            self._note_retries(response.raw.retries.history if response.raw.retries else ())
            return Received(response.status_code, response.headers, body)

    def _note_retries(self, history: Iterable[RequestHistory]) -> None:
        with self._lock:
            for past in history:
                what = str(past.status or "no connection or time-out")
                if what not in self.retried:
                    self.say(f"the server is busy or unreachable ({what}); requests are retried after a pause")
                self.retried[what] += 1

    def _session(self) -> requests.Session:
        """The thread's own session: requests does not guarantee that a session can be shared."""
        if not hasattr(self._local, "session"):
            session = DirectSession()
            session.auth = self._sign  # set even without a key: else requests would look for a password in ~/.netrc
            self._local.adapter = BoundedAdapter()
            for scheme in ("http://", "https://"):
                session.mount(scheme, self._local.adapter)
            self._local.session = session
        retry = self._retry.new()
        retry.until = time.monotonic() + PATIENCE * self._timeout[1]
        self._local.adapter.max_retries = retry
        found: requests.Session = self._local.session
        return found

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.where.key:
            request.headers["Authorization"] = f"Bearer {self.where.key}"
        return request

    def _adapt(self, response: Received, sent: dict[str, Any]) -> bool:
        """Leave out or rename a field that the server refused, if possible; True if the request should be repeated."""
        field = _error(response).get("param")
        if not isinstance(field, str) or field not in ADAPTED or field not in sent:
            return False
        with self._lock:
            if field in self._options:  # else another thread was faster
                value, other = self._options.pop(field), ADAPTED[field]
                self._options |= {other: value} if other else {}
                self.say(f"{self.model} refuses `{field}`: " + (f"`{other}` is sent instead" if other else "left out"))
        return True

    def _check(self, response: Received) -> None:
        status = response.status
        if status == HTTPStatus.OK:
            return
        shown, url = f"{status}: {self._words(response)}", self.where.url
        if 300 <= status < 400:
            target = excerpt(response.headers.get("Location", "nowhere"), 200)
            raise ConfigError(
                f"{url} redirects to {target}; redirects are not followed. If you trust it, use that URL."
            )
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            sent = f"with the key from {self.where.key_from}" if self.where.key else "without a key"
            raise ConfigError(f"{url} refused the request, sent {sent} ({shown}). Set {OWN_KEY} in the environment.")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise ConfigError(
                f"{url} has no chat/completions, or no model {self.model!r} ({shown}). Check the address, which often "
                "ends in /v1, and the model's name on the server (--judge-model)."
            )
        if status == HTTPStatus.PAYMENT_REQUIRED or _error(response).get("code") == "insufficient_quota":
            raise ConfigError(f"{url} asks for payment first ({shown}).")
        raise NoAnswer(f"the server says {shown}")

    def _words(self, response: Received) -> str:
        """The server's error message, with the key removed, which some servers echo."""
        message = _error(response).get("message")
        said = (message if isinstance(message, str) and message else response.text)[:SHOWN]
        return excerpt(said.replace(self.where.key, "…") if self.where.key else said, 200)


def _json(response: Received) -> Any:
    """The body as JSON. Raises: ValueError, also for JSON that is too deep."""
    try:
        return json.loads(response.body)
    except RecursionError:
        raise ValueError("too deep") from None


def _error(response: Received) -> dict[str, Any]:
    """The error object in the response; empty if it has none."""
    try:
        found = _json(response)
    except ValueError:
        return {}
    error = found.get("error", found) if isinstance(found, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _reply(response: Received) -> Reply:
    """The model's reply. Thoughts, which some servers send in a separate field, are not part of it."""
    try:
        choice = _json(response)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise NoAnswer(f"the server's answer holds no message: {excerpt(response.text[:SHOWN])!r}") from None
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return Reply(content if isinstance(content, str) else "", choice.get("finish_reason") == "length")


def _failure(error: Exception, timeout_s: float) -> str:
    """Reason of a failure. Equal failures get equal reasons, without addresses of objects, so they can be counted."""
    text = str(error)
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {min(CONNECT_TIMEOUT_S, timeout_s):g} s"
    if isinstance(error, requests.Timeout) or "timed out" in text.lower():
        return f"no answer within {timeout_s:g} s (--timeout)"
    if "refused" in text.lower():
        return "nothing listens at this address (connection refused)"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted"
    if "resolve" in text.lower() or "Name or service" in text:
        return "the name of the server is not known"
    return f"the connection broke off ({type(error).__name__})"
