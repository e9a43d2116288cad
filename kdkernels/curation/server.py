"""A server that answers: anything that speaks OpenAI's chat completions, through their client (vLLM among them).

What may pass is asked again here, not by the client: with the server's Retry-After, for all requests to it, and with a
record of what went wrong. The key is in the client alone. Whatever a server says is searched for it before anybody
else gets to see it.
"""

import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from kdkernels.curation.chat import Answer, Chat, Conversation, Failure
from kdkernels.errors import InputError, MissingPackage
from kdkernels.http import written

AGAIN = (408, 409, 425, 429)  # statuses that may pass, beside those from 500 on
OF_THE_QUERY = (400, 413, 422)  # statuses that say something of the one conversation; all others are of the teacher
LONGEST = 60.0  # seconds between two attempts where the server says nothing else
PATIENCE = 600.0  # seconds that a server may ask for; for more, the run is better ended and taken up later
SECRET = 12  # characters from which on a key is one: what stands for none ("EMPTY") may well be in an answer
SHOWN = 200  # characters of what a server said


class OpenAIChat(Chat):
    """Answers with a model behind an OpenAI-compatible server.

    Args:
        url: with its version, such as "http://localhost:8000/v1".
        model: its name there.
        max_new_tokens, temperature, top_p, seed: of the request.
        logprobs: asks for the log-probabilities of the answer's tokens.
        extra: further fields of the request; `max_completion_tokens` takes the place of `max_tokens`.
        key_variable: the environment variable that has the key. None: a server that asks for none.
        timeout: seconds without a sign of the server.
        retries: how often one conversation is asked for again.
        backoff: seconds before the first repetition, doubled for each other, a random half of them left out.
        requests_per_minute: at most, attempts included.
        workers: requests at the same time.

    Raises:
        InputError: a variable that is not set, or does not hold a key.
        MissingPackage: without the package `openai`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        logprobs: bool = False,
        extra: Mapping[str, Any] | None = None,
        key_variable: str | None = None,
        timeout: float = 120.0,
        retries: int = 8,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
        workers: int = 4,
    ):
        self.request = {"model": model, "temperature": temperature, "top_p": top_p, "seed": seed}
        self.request |= {"logprobs": True} if logprobs else {}
        self.extra = dict(extra or {})
        self.request |= {} if "max_completion_tokens" in self.extra else {"max_tokens": max_new_tokens}
        self.identity = self.request | {"extra": self.extra}
        self.workers, self.retries, self.backoff = workers, retries, backoff
        self._key = key_of(key_variable)
        self._written = written(self._key) if self._key else None
        self._client = _client(url, self._key, timeout)
        self._gate, self._stopped = _Gate(requests_per_minute), threading.Event()

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """The server's answers, one after another."""
        return [self._insist(each) for each in conversations]

    def stop(self) -> None:
        """Ends the waiting of all who are about to ask again."""
        self._stopped.set()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _insist(self, conversation: Conversation) -> Answer | Failure:
        faults: list[str] = []
        while True:
            if not self._gate.wait(self._stopped):
                return Failure("stopped", "the run ended before there was an answer", passes=False, faults=faults)
            try:
                return self._ask(conversation, faults)
            except Failure as failure:
                found = failure.after(faults)
            if not found.passes or len(faults) >= self.retries:
                return found
            faults.append(found.kind)
            pause = min(self.backoff * 2 ** (len(faults) - 1), LONGEST) * random.uniform(0.5, 1.0)
            if found.wait is not None:
                self._gate.hold(found.wait)
            self._stopped.wait(pause)

    def _ask(self, conversation: Conversation, faults: Sequence[str]) -> Answer:
        import openai

        messages = [dict(message) for message in conversation]
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                messages=messages, extra_body=self.extra or None, **self.request
            )
            text = raw.http_response.text
        except openai.APITimeoutError:
            raise Failure("time-out", "the server sent nothing in time") from None
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Failure("connection", self._clean(f"{type(cause).__name__}: {cause}")) from None
        except Exception as error:  # of the client or of what it is made from: an answer that is no HTTP
            raise Failure("broken answer", self._clean(f"{type(error).__name__}: {error}")) from None
        return self._read(text, faults)

    def _of_status(self, error) -> Failure:
        status, said = error.status_code, self._clean(error.response.text)
        message = f"status {status}: {said}"
        if status in AGAIN or status >= 500:
            wait = retry_after(error.response.headers.get("retry-after"))
            if wait is not None and wait > PATIENCE:
                more = f"the server asks to be left alone for {wait:.0f} s: run the same again then"
                return Failure(f"status {status}", f"{message}: {more}", passes=False, stops=True)
            return Failure(f"status {status}", message, wait=wait)
        return Failure(f"status {status}", message, passes=False, stops=status not in OF_THE_QUERY)

    def _read(self, text: str, faults: Sequence[str]) -> Answer:
        """What the body of a chat completion says."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise Failure("broken JSON", self._clean(text)) from None
        try:
            choice, usage = body["choices"][0], body.get("usage") or {}
            content, ended = choice["message"]["content"], choice.get("finish_reason")
            listed = (choice.get("logprobs") or {}).get("content")
            logprobs = [float(one["logprob"]) for one in listed] if listed else []
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise Failure("wrong schema", self._clean(text)) from None
        if ended == "content_filter":
            raise Failure("content filter", "the server kept its answer back", passes=False, final=True)
        if not isinstance(content, str):
            raise Failure("wrong schema", self._clean(text))
        tokens_in, tokens_out = (count if type(count) is int and count >= 0 else None for count in counts)
        logprob = sum(logprobs) / len(logprobs) if logprobs else None
        if self._key and len(self._key) >= SECRET and self._written.search(content):
            raise Failure("key in the answer", "the server wrote the key into its answer", passes=False, final=True)
        return Answer(content, tokens_in, tokens_out, logprob, ended == "length", tuple(faults))

    def _clean(self, text: str) -> str:
        """The beginning of what a server said, without the key."""
        text = " ".join((self._written.sub("[key]", text) if self._written else text).split())
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Gate:
    """Lets requests to a server through, one at a time where there is a rate, and none while it wants to be alone."""

    def __init__(self, per_minute: float | None):
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stopped: threading.Event) -> bool:
        """Until the next request may be made; False where none will be, as `stopped` is set."""
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self.interval
        return not stopped.wait(max(0.0, at - time.monotonic()))

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable. Raises InputError, which shows neither: a key may have been given in place of
    the variable's name.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise InputError("key_variable: expected the name of an environment variable in capitals, not the key itself")
    key = os.environ.get(variable, "")
    if not re.fullmatch(r"[!-~]+", key):
        what = "has characters that no key has" if key else "is not set"
        raise InputError(f"key_variable: the environment variable of that name {what}")
    return key


def retry_after(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date; None for none that can be read."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _client(url: str, key: str | None, timeout: float):
    try:
        import openai
    except ModuleNotFoundError as error:
        raise MissingPackage('teachers of kind "openai" need openai: pip install kdkernels[curation]') from error
    # what the environment says of OpenAI's own accounts is not for every server
    alone = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout, max_retries=0, default_headers=alone)
