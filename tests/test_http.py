"""The client of servers: what it tries again, what it gives up on, and what its errors say and do not say."""

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from faulty_server import closed_port, faulty_server

from kdkernels.errors import InputError, ServerError
from kdkernels.http import Server


def echo(path, body):
    return {"path": path, "body": json.loads(body) if body else None}


def client(url, **options):
    return Server(url, **{"timeout": 1.0, "retries": 3, "backoff": 0.01, **options})


def test_answers():
    with faulty_server(echo) as server:
        assert client(server.url + "/").post_json("/a", {"n": 1}) == {"path": "/a", "body": {"n": 1}}
        assert client(server.url + "/v1").get_json("/b", lambda value: value["path"]) == "/v1/b"
        assert json.loads(client(server.url).get("/c")) == {"path": "/c", "body": None}
        assert [path for path, _ in server.requests] == ["/a", "/v1/b", "/c"]
    with faulty_server(lambda path, body: body[::-1]) as server:
        assert client(server.url).post("/", b"\x00\x01\xff") == b"\xff\x01\x00"


@pytest.mark.parametrize("fault", ["500", "503", "429", "die", "cut", "garbage", "empty", "hang"])
def test_what_may_pass_is_asked_again(fault):
    with faulty_server(echo, [fault, fault]) as server:
        asked = client(server.url, timeout=0.2 if fault == "hang" else 1.0)
        assert asked.post_json("/x", {"n": 2})["body"] == {"n": 2}
        assert len(server.requests) == 3
        assert {body for _, body in server.requests} == {b'{"n": 2}'}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "status 500: 'out of order'"),
        ("die", "no answer"),
        ("cut", "no answer: IncompleteRead"),
        ("garbage", "cannot be used"),
        ("empty", "cannot be used"),
        ("hang", "no answer: TimeoutError"),
    ],
)
def test_what_does_not_pass_is_an_error(fault, said):
    with faulty_server(echo, always=fault) as server:
        with pytest.raises(ServerError) as caught:
            client(server.url, timeout=0.1 if fault == "hang" else 1.0, retries=1).post_json("/x", {"n": 2})
        assert str(caught.value).startswith(f"POST {server.url}/x: asked 2 times, the last time ")
        assert said in str(caught.value)
        assert len(server.requests) == 2


def test_nobody_is_there():
    with pytest.raises(ServerError, match="asked 2 times, the last time no answer: ConnectionRefusedError"):
        client(closed_port(), retries=1).get("/health")


def test_a_redirection_is_not_followed(monkeypatch):
    """The other server would get the key, and a GET without the body that was posted."""
    monkeypatch.setenv("THEIR_KEY", "secret")

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", f"{other.url}/there")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with faulty_server(echo) as other, HTTPServer(("127.0.0.1", 0), Elsewhere) as http:
        Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        asked = client(f"http://127.0.0.1:{http.server_port}", key_variable="THEIR_KEY")
        for ask in (lambda: asked.post_json("/x", {"n": 2}), lambda: asked.get_json("/x")):
            with pytest.raises(ServerError, match=rf"asked once, .* status 302: '', which leads to {other.url}/there"):
                ask()
        http.shutdown()
        assert other.requests == []


def test_a_refusal_is_not_asked_again():
    """Another path or body would be needed: the same one is refused again."""
    with faulty_server(echo, ["404"]) as server:
        with pytest.raises(ServerError, match=r"/nowhere: asked once, the last time status 404: 'out of order'"):
            client(server.url).get("/nowhere")
        assert client(server.url).get_json("/there")["path"] == "/there"


def test_an_answer_that_is_not_what_was_asked_for_is_asked_again():
    answers = iter([{"rows": 3}, {"rows": 2}])

    def two(value):
        if value["rows"] != 2:
            raise ValueError(f"expected 2 rows, got {value['rows']}")
        return value["rows"]

    with faulty_server(lambda path, body: next(answers)) as server:
        assert client(server.url).get_json("/", two) == 2
    with (
        faulty_server(lambda path, body: {"lines": 2}) as server,
        pytest.raises(ServerError, match=r"cannot be used \('rows'\): '\{\"lines\": 2\}'"),
    ):
        client(server.url, retries=0).get_json("/", two)


def test_retry_after_is_honoured():
    with faulty_server(echo, ["429"], retry_after="0.3") as server:
        start = time.monotonic()
        client(server.url).get("/")
        assert time.monotonic() - start >= 0.3
        assert len(server.requests) == 2


def test_keys_are_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-planted-4711")
    with faulty_server(lambda path, body: b"x" * 190 + b" sk-planted-4711 is wrong") as server:  # shown in part
        asked = client(server.url, key_variable="SOME_KEY", retries=0)
        with pytest.raises(ServerError) as caught:
            asked.post_json("/x", {})
        assert "sk-pl" not in str(caught.value) and "***" in str(caught.value)
    with faulty_server(lambda path, body: b"your key sk-planted-4711 is wrong") as server:
        asked = client(server.url, key_variable="SOME_KEY", retries=0)
        with pytest.raises(ServerError) as caught:
            asked.get_json("/v1/models")
        assert server.headers[0]["Authorization"] == "Bearer sk-planted-4711"
        assert "planted" not in str(caught.value) and "planted" not in repr(vars(asked))
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(InputError, match=r"SOME_KEY.*is not set"):
        client("http://localhost:1", key_variable="SOME_KEY")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://user:planted@host/v1"])
def test_urls_that_are_none(url):
    with pytest.raises(InputError, match=r"^url: expected") as caught:
        Server(url)
    assert "planted" not in str(caught.value)
