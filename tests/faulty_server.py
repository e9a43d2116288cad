"""A server on loopback that answers as a test wants it to, and fails on demand."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

FAULTS = ("ok", "hang", "die", "cut", "garbage", "empty")  # beside the statuses


@dataclass
class FaultyServer:
    """`requests`: the paths and bodies that came, in their order. `faults`: what becomes of the next requests, one
    after another; "ok" when they are used up. `always`: what becomes of all requests, if not None.
    """

    url: str = ""
    faults: list[str] = field(default_factory=list)
    always: str | None = None
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._serve(b"")

    def do_POST(self):
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        state = self.server.state
        with self.server.lock:
            state.requests.append((self.path, body))
            state.headers.append(dict(self.headers))
            fault = state.always or (state.faults.pop(0) if state.faults else "ok")
        assert fault in FAULTS or fault.isdecimal(), fault
        if fault == "hang":
            self.server.ended.wait()
        if fault in ("hang", "die"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, said = int(fault) if fault.isdecimal() else 200, b"out of order"
        if status == 200:
            said = self.server.answer(self.path, body)
            said = said if isinstance(said, bytes) else json.dumps(said).encode()
        said = {"garbage": b"<html>\xff\xfe", "empty": b""}.get(fault, said)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said[: len(said) // 2] if fault == "cut" else said)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):  # a client that went away
        pass


@contextmanager
def faulty_server(
    answer: Callable[[str, bytes], bytes | dict | list],
    faults: Sequence[str] = (),
    always: str | None = None,
    retry_after: str = "0",
) -> Iterator[FaultyServer]:
    """Serves until the context ends. `answer(path, body)` makes the content of a good answer.

    faults: a status such as "500" or "429" (with Retry-After); "hang": no answer until the context ends; "die": the
    connection ends without one; "cut": half of the body; "garbage": what is no JSON; "empty": nothing.
    """
    with _Http(("127.0.0.1", 0), _Handler) as http:
        http.answer, http.ended, http.lock, http.retry_after = answer, Event(), Lock(), retry_after
        http.state = FaultyServer(f"http://127.0.0.1:{http.server_port}", list(faults), always)
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield http.state
        finally:
            http.ended.set()
            http.shutdown()
            thread.join()


def closed_port() -> str:
    """The url of a server that is not there."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until `condition` holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not hold within {seconds} s")
        time.sleep(0.01)
