"""A teacher behind a server: what is asked again, how long is waited, what is never shown."""

import json
import logging
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from html import escape
from urllib.parse import quote

import pytest

pytest.importorskip("openai")

from faulty_server import closed_port, faulty_server, wait_for

from kdkernels.curation import Failure, OpenAIChat, curate, read_curation
from kdkernels.curation.server import _Gate, retry_after
from kdkernels.errors import InputError, ServerError

from .oracle import completion, oracle, write_recipe

KEY = "sk-planted-4711-0815"
ASKED = [{"role": "user", "content": "What is 11 plus 4?"}]


def chat(url: str, **settings) -> OpenAIChat:
    return OpenAIChat(f"{url}/v1", "ann", **{"max_new_tokens": 50, "backoff": 0.001, "timeout": 30.0, **settings})


def sent_key(headers: dict[str, str]) -> str:
    return {name.lower(): value for name, value in headers.items()}["authorization"]


def says(content, **keys):
    return lambda path, body: completion(content, **keys)


def test_what_is_asked_and_answered():
    with faulty_server(says("¡Sí! 🧮\n", tokens=9)) as server:
        answer = chat(server.url, temperature=0.5, top_p=0.9, seed=3, extra={"top_k": 5}).answer(ASKED)
        assert (answer.text, answer.tokens_in, answer.tokens_out, answer.truncated) == ("¡Sí! 🧮\n", 100, 9, False)
        path, body = server.requests[0]
        assert path == "/v1/chat/completions"
        expected = {"model": "ann", "messages": ASKED, "temperature": 0.5, "top_p": 0.9, "seed": 3, "top_k": 5}
        assert json.loads(body) == expected | {"max_tokens": 50}
        chat(server.url, extra={"max_completion_tokens": 60}).answer(ASKED)
        assert "max_tokens" not in json.loads(server.requests[1][1])


def test_a_megabyte_arrives_whole():
    text = "wörd " * 200_000
    with faulty_server(says(text)) as server:
        assert chat(server.url).answer(ASKED).text == text


def test_an_answer_that_was_cut_short_says_so():
    with faulty_server(says("I add", finish_reason="length")) as server:
        assert chat(server.url).answer(ASKED).truncated


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("500", "status 500"),
        ("429", "status 429"),
        ("408", "status 408"),
        ("die", "connection"),
        ("cut", "connection"),
        ("garbage", "broken JSON"),
        ("empty", "broken JSON"),
        ("hang", "time-out"),
    ],
)
def test_what_may_pass_is_asked_again(fault, kind):
    timeout = 0.8 if fault == "hang" else 30.0
    with faulty_server(oracle, [fault]) as server:
        answer = chat(server.url, timeout=timeout).answer(ASKED)
        assert answer.faults == (kind,) and "15" in answer.text
    with faulty_server(oracle, always=fault) as server, pytest.raises(Failure) as caught:
        chat(server.url, timeout=timeout, retries=1).answer(ASKED)
    assert (caught.value.kind, caught.value.faults) == (kind, (kind,))
    assert caught.value.passes and not caught.value.final and not caught.value.stops
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"text": "x"}]},
        [],
        {"error": {"message": "?"}},
        {**completion("x"), "usage": 7},
    ],
)
def test_a_wrong_schema_is_asked_again(body):
    bodies = [json.dumps(body).encode(), json.dumps(completion("fine")).encode()]
    with faulty_server(lambda path, _: bodies.pop(0)) as server:
        answer = chat(server.url).answer(ASKED)
    assert (answer.text, answer.faults) == ("fine", ("wrong schema",))


def test_usage_that_is_not_told_is_not_known():
    body = completion("fine")
    del body["usage"]
    with faulty_server(lambda path, _: body) as server:
        assert (chat(server.url).answer(ASKED).tokens_in, chat(server.url).answer(ASKED).logprob) == (None, None)


@pytest.mark.parametrize(("status", "stops"), [("400", False), ("422", False), ("401", True), ("404", True)])
def test_what_does_not_pass_is_asked_once(status, stops):
    with faulty_server(oracle, always=status) as server, pytest.raises(Failure) as caught:
        chat(server.url).answer(ASKED)
    assert len(server.requests) == 1
    assert (caught.value.stops, caught.value.final, caught.value.passes) == (stops, False, False)


def test_a_filtered_answer_is_final():
    with faulty_server(says(None, finish_reason="content_filter")) as server, pytest.raises(Failure) as caught:
        chat(server.url).answer(ASKED)
    assert caught.value.final and caught.value.kind == "content filter" and len(server.requests) == 1


def test_nobody_there():
    with pytest.raises(Failure) as caught:
        chat(closed_port(), retries=1).answer(ASKED)
    assert caught.value.kind == "connection" and caught.value.faults == ("connection",)


def test_retry_after_holds_all_requests_back():
    with faulty_server(oracle, ["429"], retry_after="1") as server:
        asked = chat(server.url)
        began = time.monotonic()
        assert asked.answer(ASKED).faults == ("status 429",)
        assert time.monotonic() - began >= 1.0
        server.faults.append("429")
        began = time.monotonic()
        held = threading.Thread(target=asked.answer, args=(ASKED,))
        held.start()
        wait_for(lambda: asked._gate._next >= began + 1.0)
        asked.answer(ASKED)  # was told nothing itself
        assert time.monotonic() - began >= 1.0
        held.join()
    with faulty_server(oracle, always="429", retry_after="86400") as server, pytest.raises(Failure) as caught:
        chat(server.url).answer(ASKED)
    assert caught.value.stops and "86400 s: run the same again then" in str(caught.value)
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date():
    later = datetime.now(timezone.utc) + timedelta(seconds=50)
    assert 40 < retry_after(format_datetime(later, usegmt=True)) <= 50
    assert [retry_after(text) for text in ("2.5", "0", "-3", None, "soon", "inf", "nan")] == [2.5, 0, 0, *[None] * 4]


def test_a_rate_spaces_requests():
    gate, never = _Gate(1200.0), threading.Event()
    began = time.monotonic()
    assert all(gate.wait(never) for _ in range(5))
    assert time.monotonic() - began >= 4 * 0.05
    never.set()
    gate.hold(1000.0)
    assert not gate.wait(never)


def test_a_stop_ends_the_waiting():
    with faulty_server(oracle, always="503") as server:
        asked = chat(server.url, backoff=60.0)
        threading.Timer(0.3, asked.stop).start()
        with pytest.raises(Failure) as caught:
            asked.answer(ASKED)
    assert caught.value.kind == "stopped"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-service")
    return "TEACHER_KEY"


def test_the_key_goes_to_the_server_and_nowhere_else(key, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)

    def echo(path, body):
        query = json.loads(body)["messages"][0]["content"]
        if "What is 3 plus" in query:
            return completion(f"<rationale>{KEY}</rationale>")
        return {"error": f"wrong key {KEY}"} if "What is 5 plus" in query else oracle(path, body)

    with faulty_server(echo) as server:
        recipe = write_recipe(tmp_path, server.url, t_key_variable=key, t_retries=1)
        curate(read_curation(recipe))
        assert {sent_key(each) for each in server.headers} == {f"Bearer {KEY}"}
        assert not any("another-service" in value for each in server.headers for value in each.values())
    with faulty_server(lambda *_: (_ for _ in ()).throw(OSError), ["401"]) as server:
        other = read_curation(write_recipe(tmp_path, server.url, output=f"{tmp_path}/b", t_key_variable=key))
        with pytest.raises(ServerError) as caught:
            curate(other)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 8
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    said = capsys.readouterr()
    assert KEY not in said.out + said.err + caplog.text + repr(caught.value) + str(caught.value.__context__)
    failures = (tmp_path / "out/failures.jsonl").read_text()
    assert "key in the answer" in failures and "wrong key [key]" in failures


@pytest.mark.parametrize(
    "code", [json.dumps, lambda key: key.replace("/", "\\/").replace("+", "\\u002B"), quote, escape]
)
def test_a_key_is_found_however_it_is_written(monkeypatch, code):
    key = 'sk-a+b/c&d="longer'
    monkeypatch.setenv("TEACHER_KEY", key)
    said = code(key).strip('"')
    for body in (json.dumps(completion(said)), f"wrong key: {said}", said * 20):
        with faulty_server(lambda *_, body=body: body.encode()) as server, pytest.raises(Failure) as caught:
            chat(server.url, key_variable="TEACHER_KEY", retries=0).answer(ASKED)
        assert "sk-a" not in str(caught.value) and (caught.value.final or "[key]" in str(caught.value))


def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch):
    for given in ("", "two words-of-a-key", "sk-ключ", "sk-line\nbreak"):
        monkeypatch.setenv("TEACHER_KEY", given)
        with pytest.raises(InputError, match="key_variable") as caught:
            chat("http://localhost", key_variable="TEACHER_KEY")
        assert not given or given not in str(caught.value)
    with pytest.raises(InputError, match="not the key itself") as caught:
        chat("http://localhost", key_variable="sk-" + KEY)
    assert KEY not in str(caught.value)


def test_no_key_of_the_environment_is_sent_to_a_server_without_one(key):
    with faulty_server(oracle) as server:
        chat(server.url).answer(ASKED)
        assert sent_key(server.headers[0]) == "Bearer none"
