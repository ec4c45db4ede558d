"""One question to an OpenAI-compatible server: key, retries, and each way in which it can go wrong."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry
from urllib3.util.retry import RequestHistory

from qdpo.data.layouts.turns import Message, excerpt
from qdpo.errors import ConfigError

OWN_KEY, OPENAI_KEY, OPENAI_HOST = "QDPO_JUDGE_KEY", "OPENAI_API_KEY", "api.openai.com"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that say: later. 409 is a lock, and 529 an overload, in the APIs that send them."""
CONNECT_TIMEOUT_S = 10.0
LONGEST_WAIT_S = 300
"""Longest wait that a server may ask for with Retry-After."""
ADAPTED = {"max_tokens": "max_completion_tokens", "temperature": None}
"""Fields that OpenAI's newer models refuse: the field in its place, or none."""


class NoAnswer(Exception):
    """The server gave no usable answer to this question; `reason` is short, for counting."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TornReply(NoAnswer):
    """The connection broke in the middle of a reply: urllib3 does not ask again once the reply has begun."""


@dataclass(frozen=True)
class Reply:
    """What the model said; empty where it said nothing, and whether it was cut at the length limit."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Endpoint:
    """Where the questions go, and the key that goes with them."""

    url: str
    """Up to and with `/v1`."""
    host: str
    key: str | None
    key_from: str | None
    """The environment variable that held the key."""

    @property
    def warning(self) -> str | None:
        """What the user should know before the key is sent."""
        if self.key and self.url.startswith("http:") and not _is_here(self.host):
            return f"warning: {self.key_from} goes to {self.host} over plain http, where others can read it"
        return None


def endpoint(url: str) -> Endpoint:
    """Reads what follows `openai:`. OPENAI_API_KEY is sent to OpenAI alone, QDPO_JUDGE_KEY to any server.

    Raises: ConfigError for something that is no http address, or with a password in it; for a key that is none.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:  # not echoed: it may be a secret
        raise ConfigError(
            "--by openai:URL must hold no password, no ? and no #. A key belongs into the environment variable "
            f"{OWN_KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--by openai:{url} is no http address. Give one as in openai:http://localhost:8000/v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    sources = (OWN_KEY, OPENAI_KEY) if parts.hostname == OPENAI_HOST else (OWN_KEY,)
    source = next((name for name in sources if os.environ.get(name, "").strip()), None)
    key = os.environ[source].strip() if source else None
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{source} (from the environment) holds characters that no key has. Set it again.")
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path}", parts.hostname, key, source)


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Server:
    """Asks one model. May be used by several threads at once."""

    def __init__(self, where: Endpoint, model: str, *, timeout_s: float, max_tokens: int, backoff_s: float = 1.0):
        self.where, self.model = where, model
        self.retried = Counter[str]()
        """Requests that were sent again, by what had gone wrong."""
        self.say: Callable[[str], None] = lambda line: None
        self._timeout = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        self._retry = Retry(
            total=6, connect=3, read=2, other=3, status=6, redirect=0, allowed_methods=None, status_forcelist=RETRIED,
            backoff_factor=backoff_s, backoff_max=60, backoff_jitter=backoff_s, raise_on_status=False,
            retry_after_max=LONGEST_WAIT_S,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._local = threading.local()

    def ask(self, messages: list[Message]) -> Reply:
        """The model's answer at temperature 0.

        Raises: NoAnswer for this question, TornReply where it may be asked again at once; ConfigError for what would go
        wrong with every question.
        """
        while True:
            options = dict(self._options)
            response = self._post({"model": self.model, "messages": messages, **options})
            if response.status_code == HTTPStatus.BAD_REQUEST and self._adapt(response, options):
                continue
            self._check(response)
            return _reply(response)

    def _post(self, payload: dict[str, Any]) -> requests.Response:
        try:
            # No redirect is followed: it could carry question and key elsewhere.
            response = self._session().post(
                f"{self.where.url}/chat/completions", json=payload, timeout=self._timeout, allow_redirects=False,
                stream=True,
            )  # fmt: skip
        except requests.RequestException as error:
            raise NoAnswer(_failure(error, self._timeout[1])) from None
        try:
            response.content  # noqa: B018  # read here; it is kept
        except requests.RequestException as error:
            raise TornReply(_failure(error, self._timeout[1])) from None
        self._note_retries(response.raw.retries.history if response.raw.retries else ())
        return response

    def _note_retries(self, history: Iterable[RequestHistory]) -> None:
        with self._lock:
            for past in history:
                what = str(past.status or "no connection or time-out")
                if what not in self.retried:
                    self.say(f"the server needs patience ({what}): such requests are sent again after a pause")
                self.retried[what] += 1

    def _session(self) -> requests.Session:
        """One for each thread: requests does not promise that a session can be shared."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.auth = self._sign  # set even without a key: requests would look for a password in ~/.netrc
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self._retry))
            self._local.session = session
        found: requests.Session = self._local.session
        return found

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.where.key:
            request.headers["Authorization"] = f"Bearer {self.where.key}"
        return request

    def _adapt(self, response: requests.Response, sent: dict[str, Any]) -> bool:
        """Whether the server refused a field that can be left out or called otherwise; then it is."""
        field = _error(response).get("param")
        if field not in ADAPTED or field not in sent:
            return False
        with self._lock:
            if field in self._options:  # else another thread was faster
                value, other = self._options.pop(field), ADAPTED[field]
                self._options |= {other: value} if other else {}
                self.say(f"{self.model} refuses `{field}`: " + (f"`{other}` is sent instead" if other else "left out"))
        return True

    def _check(self, response: requests.Response) -> None:
        status = response.status_code
        if status == HTTPStatus.OK:
            return
        shown, url = f"{status}: {self._words(response)}", self.where.url
        if 300 <= status < 400:
            target = excerpt(response.headers.get("Location", "nowhere"), 200)
            raise ConfigError(f"{url} points to {target}, which is not followed. If you trust it, give that address.")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            sent = f"with the key from {self.where.key_from}" if self.where.key else "without a key"
            raise ConfigError(f"{url} refused the question, asked {sent} ({shown}). Set {OWN_KEY} in the environment.")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise ConfigError(
                f"{url} knows no chat/completions, or no model {self.model!r} ({shown}). The address often ends in "
                "/v1, and --judge-model is named as the server names it."
            )
        if status == HTTPStatus.PAYMENT_REQUIRED or _error(response).get("code") == "insufficient_quota":
            raise ConfigError(f"{url} wants to be paid first ({shown}).")
        raise NoAnswer(f"the server says {shown}")

    def _words(self, response: requests.Response) -> str:
        """What the server says about an error, without the key, which some servers repeat."""
        said = str(_error(response).get("message") or response.text or response.reason)
        return excerpt(said.replace(self.where.key, "…") if self.where.key else said, 200)


def _error(response: requests.Response) -> dict[str, Any]:
    """The error that the answer describes; empty where it describes none."""
    try:
        found = response.json()
    except ValueError:
        return {}
    error = found.get("error", found) if isinstance(found, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _reply(response: requests.Response) -> Reply:
    """What the model said. Thoughts, which some servers send in a field of their own, are no answer."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise NoAnswer(f"the server's answer holds no message: {excerpt(response.text)!r}") from None
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return Reply(content if isinstance(content, str) else "", choice.get("finish_reason") == "length")


def _failure(error: requests.RequestException, timeout_s: float) -> str:
    """The same reason for the same failure, so that it can be counted: no address of a thread or an object in it."""
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
