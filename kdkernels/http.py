"""What this library asks of servers over HTTP: one client, which tries again where that can help."""

import html
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdkernels.errors import InputError, ServerError

AGAIN = (408, 425, 429)  # statuses that say "later", beside those from 500 on
LONGEST_PAUSE = 60.0  # seconds
SHOWN = 200  # characters of an answer that an error quotes

T = TypeVar("T")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for an error: what is posted would arrive without its body, and the key at another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_Stay)


class Server:
    """A server at `url`, asked again where it fails in a way that may pass.

    That are connections that fail or break off, answers that do not come in time or are cut, the statuses 408, 425, 429
    and those from 500 on, and answers that `read` refuses. Before the n-th repetition it waits for
    `backoff` * 2^(n - 1) seconds, drawn between the half and the whole of that, or as long as the server's Retry-After
    says, at most a minute.

    Args:
        url: "http://host:port", with a path in front of all others if it has one.
        timeout: seconds for an answer to begin, and for each part of it to follow.
        retries: how often it is asked again.
        backoff: seconds before the first repetition.
        key_variable: the environment variable that has the server's key, which is sent as a bearer token and never
            shown.

    Raises:
        InputError: a url that is none, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
        key_variable: str | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url: expected http://HOST:PORT or https://HOST, got {_without_secrets(url)!r}")
        if parts.username is not None or parts.password is not None:
            raise InputError("url: expected no user and password in it: name an environment variable that has the key")
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        if key_variable is not None and not os.environ.get(key_variable):
            raise InputError(f"the environment variable {key_variable}, which has the key of {url}, is not set")
        self.key_variable = key_variable

    def post(self, path: str, body: dict | bytes, read: Callable[[bytes], T] = bytes) -> T:
        """What `read` makes of the answer to `body`, which is sent as JSON unless it is bytes.

        Raises ServerError where there is no answer, or `read` raises ValueError for each.
        """
        return self._ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), read)

    def get(self, path: str, read: Callable[[bytes], T] = bytes) -> T:
        """As `post`, of what lies at `path`."""
        return self._ask("GET", path, None, read)

    def post_json(self, path: str, body: dict, read: Callable[[Any], T] = lambda value: value) -> T:
        """What `read` makes of the answer's JSON; an answer that is none is refused as one that `read` refuses."""
        return self.post(path, body, lambda answer: read(json.loads(answer)))

    def get_json(self, path: str, read: Callable[[Any], T] = lambda value: value) -> T:
        """As `post_json`, of what lies at `path`."""
        return self.get(path, lambda answer: read(json.loads(answer)))

    def _ask(self, method: str, path: str, body: bytes | None, read: Callable[[bytes], T]) -> T:
        for attempt in range(self.retries + 1):
            pause = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
            try:
                with OPENER.open(self._request(method, path, body), timeout=self.timeout) as answer:
                    content = answer.read()
                try:
                    return read(content)
                except (ValueError, LookupError, TypeError, RecursionError) as error:  # what an answer may get wrong
                    problem = f"an answer that cannot be used ({error}): {self._start(content)}"
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {self._start(_body(error))}{_sent_on(error)}"
                if error.code not in AGAIN and error.code < 500:
                    raise self._failed(method, path, problem, attempt + 1) from None
                pause = _retry_after(error, pause)
            except (OSError, http.client.HTTPException) as error:
                problem = f"no answer: {_reason(error)}"
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_PAUSE))
        raise self._failed(method, path, problem, self.retries + 1)

    def _request(self, method: str, path: str, body: bytes | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json" if body and body[:1] in b"{[" else "application/octet-stream"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        return urllib.request.Request(self.url + path, body, headers, method=method)

    def _failed(self, method: str, path: str, problem: str, times: int) -> ServerError:
        often = "once" if times == 1 else f"{times} times"
        text = f"{method} {self.url}{path}: asked {often}, the last time {problem}; see the server's own log"
        return ServerError(self._clean(text))

    def _clean(self, text: str) -> str:
        key = os.environ.get(self.key_variable) if self.key_variable is not None else None
        return written(key).sub("***", text) if key else text

    def _start(self, content: bytes) -> str:
        """The beginning of what the server said, without the key: it goes before anything is cut off."""
        text = self._clean(content.decode("utf-8", errors="replace"))
        return repr(text[:SHOWN] + "..." if len(text) > SHOWN else text)


def written(key: str) -> re.Pattern:
    """What finds a key in any of the ways in which JSON, HTML and a URL write its characters."""

    def ways(character: str) -> str:
        code = ord(character)
        plain = rf"\\*{re.escape(character)}|{re.escape(html.escape(character))}"
        return rf"(?:{plain}|(?i:\\+u{code:04x}|%{code:02x}|&\#x0*{code:x};|&\#0*{code};))"

    return re.compile("".join(one if one.isalnum() else ways(one) for one in key))


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _sent_on(error: urllib.error.HTTPError) -> str:
    """Where a redirection leads, in words."""
    place = error.headers.get("Location") if 300 <= error.code < 400 else None
    return f", which leads to {_without_secrets(place)}: give the url of the server itself" if place else ""


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return f"{type(reason).__name__}: {reason}"


def _retry_after(error: urllib.error.HTTPError, otherwise: float) -> float:
    """Seconds that the server asks to wait, as a number or a date."""
    said = error.headers.get("Retry-After", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError):
        return otherwise


def _without_secrets(url: str) -> str:
    """`url` without what stands before an @, which may be a password."""
    return url.rpartition("@")[2]
