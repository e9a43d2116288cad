"""The journal: what was answered is there after a kill, and nobody is asked for it again."""

import json
import random

import pytest

from kdkernels.curation import Answer, Failure, Journal
from kdkernels.curation.journal import address
from kdkernels.errors import InputError

ANSWER = Answer("süß\n🧮", 3, None, -0.5, True, ("time-out",))


def said(found):
    return found if isinstance(found, Answer) else (found.kind, str(found), found.final, found.faults)


def test_what_is_put_is_got(tmp_path):
    path = tmp_path / "deep/answers.jsonl"
    final, passing = Failure("content filter", "no", final=True), Failure("time-out", "late", faults=("time-out",))
    journal = Journal(path)
    journal.put([("a", "ann", ANSWER), ("b", "ann", final)])
    journal.put([("c", "ben", passing)])
    for _ in range(2):
        assert said(journal.get("a")) == ANSWER and said(journal.get("b")) == said(final)
        assert said(journal.get("c")) == said(passing) and journal.get("d") is None
        assert [journal.has(one) for one in "abcd"] == [True, True, False, False]
        journal.close()
        journal = Journal(path)
    journal.put([("c", "ben", ANSWER)])
    assert journal.get("c") == ANSWER and journal.has("c")
    journal.close()
    assert Journal(path).has("c")


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    journal = Journal(path)
    for one in "abcd":
        journal.put([(one, "ann", ANSWER)])
    journal.close()
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        there = whole[:cut].count(b"\n")
        assert [journal.has(one) for one in "abcd"] == [i < there for i in range(4)]
        for one in "abcd"[there:]:
            journal.put([(one, "ann", ANSWER)])
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["a note of one line", "{", '{"answers": [', '{"question": "x"}', '{"answers": {}}'])
def test_what_is_no_journal_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    if '{"answers": ['.startswith(text):
        assert not Journal(path).has("a") and not path.read_text()
        return
    with pytest.raises(InputError, match=r"line 1 is damaged, or the file is no journal"):
        Journal(path)
    assert path.read_text() == text


def test_a_line_in_the_middle_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    for line in ("no JSON", "[]", json.dumps({"answers": [{}]}), json.dumps({"question": "x"})):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match=r"line 1 is damaged, or the file is no journal"):
            Journal(path)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [('"text"', '"txet"'), ('"text": "', '"text": 5, "x": "'), ("true", '"yes"'), ("-0.5", '"-0.5"'), (": 3", ": 3.5")],
)
def test_an_answer_that_was_changed_into_none_is_refused(tmp_path, was, becomes):
    path = tmp_path / "answers.jsonl"
    Journal(path).put([("a", "ann", ANSWER)])
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, becomes, 1))
    with pytest.raises(InputError, match=r"line 1 is damaged"):
        Journal(path)
    assert path.read_text() == text.replace(was, becomes, 1)


def test_one_process_at_a_time(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    with pytest.raises(InputError, match="another run has"):
        Journal(tmp_path / "answers.jsonl")
    journal.close()
    Journal(tmp_path / "answers.jsonl").close()


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    from kdkernels.curation import journal as module
    from kdkernels.training.errors import DiskError

    journal = Journal(tmp_path / "answers.jsonl")
    journal.put([("a", "ann", ANSWER)])

    def half(file, line):
        file.write(line[: len(line) // 2])
        raise DiskError("full")

    with monkeypatch.context() as patched:
        patched.setattr(module, "append", half)
        with pytest.raises(DiskError):
            journal.put([("b", "ann", ANSWER)])
    journal.put([("c", "ann", ANSWER)])
    assert not journal.has("b") and journal.get("c") == ANSWER
    journal.close()
    assert [Journal(tmp_path / "answers.jsonl").has(one) for one in "a"] == [True]


def test_addresses_differ_by_all_that_an_answer_depends_on():
    asked = [{"role": "user", "content": "x"}]
    base = address("ann", {"model": "m", "temperature": 0.0}, asked)
    assert base == address("ann", {"temperature": 0.0, "model": "m"}, [dict(asked[0])])
    assert len(base) == 32
    others = [
        address("ben", {"model": "m", "temperature": 0.0}, asked),
        address("ann", {"model": "m", "temperature": 0.1}, asked),
        address("ann", {"model": "m", "temperature": 0.0}, [{"role": "user", "content": "y"}]),
        address("ann", {"model": "m", "temperature": 0.0}, [*asked, *asked]),
    ]
    assert len({base, *others}) == 5
