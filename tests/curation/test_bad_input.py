"""What cannot be curated is refused before anybody is asked, with the key, what was expected and what came."""

import json
import re
from pathlib import Path

import pytest

from kdkernels.curation import Answer, Chat, curate, read_curation
from kdkernels.errors import InputError

from .oracle import read_lines, sections, write_recipe

LOCAL = '[[curation.teachers]]\nname = "{name}"\nkind = "local"\npath = "{path}"\n'


class Scripted(Chat):
    """Says what it is told to; for programs of a caller's own."""

    def __init__(self, name: str, say):
        self.identity, self.say, self.asked = {"model": name}, say, 0
        self.batch = 3

    def answers(self, conversations):
        assert 1 <= len(conversations) <= self.batch
        self.asked += len(conversations)
        return [Answer(self.say(one[0]["content"]), 1, 1) for one in conversations]


@pytest.fixture
def recipe(tmp_path):
    """Three local teachers, which are brought by the caller where they answer."""
    path = write_recipe(tmp_path, "", queries=5, teachers=())
    path.write_text(path.read_text() + "".join(LOCAL.format(name=name, path=tmp_path) for name in "abc"))
    return path


def refused(recipe, said, *overrides, **changes):
    text = recipe.read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new, 1)
    other = recipe.with_name("changed.toml")
    other.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        read_curation(other, overrides)
    assert str(caught.value).startswith(str(other))


def test_the_recipe_is_sound(recipe):
    assert len(read_curation(recipe).teachers) == 3


@pytest.mark.parametrize(
    ("said", "overrides"),
    [
        ("expected a number from 0 to 1, got 1.5", ["threshold=1.5"]),
        ("expected a number from 0 to 1, got -0.1", ["threshold=-0.1"]),
        ("unknown key 'treshold'; did you mean 'threshold'", ["treshold=0.5"]),
        ("teachers: expected at least one table", ["teachers=[]"]),
        ("expected one of 'confidence'", ["quality=best"]),
        ("no such file: nowhere.jsonl", ["queries=nowhere.jsonl"]),
        ("expected one of code, mathematics, multiple_choice, or the path", ["task=cooking"]),
        ("cannot be read", ["task=nowhere.toml"]),
        ('embedding: diversity "embedding" of three or more teachers needs', ["diversity=embedding"]),
        ("embedding: no such directory: nowhere", ["diversity=embedding", "embedding=nowhere"]),
        ('expected "keep" of programs', ["task=code", "disagreement=majority"]),
    ],
)
def test_keys_that_are_wrong(recipe, said, overrides):
    refused(recipe, said, *(f"curation.{one}" for one in overrides))


@pytest.mark.parametrize(
    ("said", "old", "new"),
    [
        ("expected names that differ, got 'a' twice", 'name = "b"', 'name = "a"'),
        ("expected a name, which is not empty", 'name = "b"', 'name = " "'),
        (r'teachers\[0\] \(a\) url: a teacher of kind "openai" needs it', 'kind = "local"', 'kind = "openai"'),
        ("expected one of 'local', 'openai', got 'oracle'", 'kind = "local"', 'kind = "oracle"'),
        (r'\(a\) model: a teacher of kind "local" has none', 'kind = "local"', 'kind = "local"\nmodel = "m"'),
        ("no such directory: /nowhere", 'path = "', 'path = "/nowhere" # "'),
        ("unknown key 'api_key'", 'kind = "local"', 'kind = "local"\napi_key = "sk-secret"'),
        ("section .curation. is missing", "[curation]", "[other]"),
        ('quality "correct" compares with it', 'label = "{answer}"', 'quality = "correct"'),
    ],
)
def test_tables_that_are_wrong(recipe, said, old, new):
    if said.startswith("section"):
        recipe.write_text(recipe.read_text().replace("[[curation.", "[[other."))
    refused(recipe, said, change=(old, new))


SERVER = 'kind = "openai"\nmodel = "m"\nurl = "{url}"\n'


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x/v1", "http://", "http://user:sk-pw@x/v1", "http://x/v1?key=sk-pw", "http://x:y/v1"],
)
def test_urls_that_are_none_or_have_secrets(tmp_path, url):
    path = write_recipe(tmp_path, "http://localhost", teachers=["a"])
    path.write_text(path.read_text().replace("http://localhost/v1", url))
    with pytest.raises(InputError, match=r"teachers\[0\] \(a\) url: expected http://HOST:PORT/v1") as caught:
        read_curation(path)
    assert "sk-pw" not in str(caught.value)


def test_keys_that_are_not_set(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    path = write_recipe(tmp_path, "http://localhost", teachers=["a"], t_key_variable="NO_SUCH_KEY")
    with pytest.raises(InputError, match=r"\(a\) key_variable: the environment variable of that name is not set"):
        read_curation(path)
    path.write_text(path.read_text().replace("NO_SUCH_KEY", "sk-secret"))
    with pytest.raises(InputError, match="not the key itself") as caught:
        read_curation(path)
    assert "sk-secret" not in str(caught.value)


def test_log_probabilities_that_no_server_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="needs logprobs = true of a"):
        read_curation(write_recipe(tmp_path, "http://localhost", teachers=["a"], quality="log_probability"))


def good(text: str) -> str:
    return sections("I add.", "1", "1.0")


def test_teachers_of_the_caller(recipe, tmp_path):
    chats = {name: Scripted(name, good) for name in "abc"}
    chats["b"].say = lambda text: "<label>1</label><confidence>1</confidence>"  # no rationale
    curate(read_curation(recipe), chats=chats)
    assert [one["teacher"] for one in read_lines(tmp_path / "out/dataset.jsonl")] == ["a", "c"] * 5
    whys = {one["why"] for one in read_lines(tmp_path / "out/decisions.jsonl") if one["teacher"] == "b"}
    assert whys == {"unreadable: rationale is missing"}
    assert [chat.asked for chat in chats.values()] == [5] * 3
    curate(read_curation(recipe), chats=chats)
    assert [chat.asked for chat in chats.values()] == [5] * 3
    with pytest.raises(InputError, match="expected names of teachers of the recipe, got 'd'"):
        curate(read_curation(recipe), chats=chats | {"d": chats["a"]})


def test_a_directory_of_another_run(recipe, tmp_path):
    chats = {name: Scripted(name, good) for name in "abc"}
    curate(read_curation(recipe), chats=chats)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"settings threshold: 0.95 there, 0.5 now.*answers = .* not asked for again"):
        curate(read_curation(recipe, ["curation.threshold=0.5"]), chats=chats)
    with pytest.raises(InputError, match=r"teacher a: {'model': 'a'} there, {'model': 'd'} now"):
        curate(read_curation(recipe), chats=chats | {"a": Scripted("d", good)})
    queries = tmp_path / "queries.jsonl"
    queries.write_text(queries.read_text() + json.dumps({"question": "?", "answer": "1"}) + "\n")
    with pytest.raises(InputError, match="files queries: "):
        curate(read_curation(recipe), chats=chats)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("!")
    with pytest.raises(InputError, match="holds something that is no curation"):
        curate(read_curation(recipe, [f"curation.output={tmp_path}/mine"]), chats=chats)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_nothing_that_is_kept(recipe, tmp_path):
    chats = {name: Scripted(name, lambda text: "?") for name in "abc"}
    with pytest.raises(InputError, match=r"no answer is kept: .*report.md says why"):
        curate(read_curation(recipe), chats=chats)
    assert "| unreadable: rationale is missing | 5 | 5 | 5 |" in (tmp_path / "out/report.md").read_text()


def test_programs_are_not_compared(recipe):
    config = read_curation(recipe, ["curation.task=code", "curation.quality=correct"])
    chats = {name: Scripted(name, good) for name in "abc"}
    with pytest.raises(InputError, match="needs a function that runs their tests"):
        curate(config, chats=chats)
    curate(config, chats=chats, correct=lambda label, right: True)


def test_queries_that_are_none(recipe, tmp_path):
    queries = tmp_path / "queries.jsonl"
    for text, said in (
        ("", "has no line"),
        ('{"question": " ", "answer": 1}\n', r"line 1: \[curation\] query: expected a text"),
        ('{"answer": 1}\n', r"field 'question' of \[curation\] query is missing"),
        ('{"question": "x"}\n', r"field 'answer' of \[curation\] label is missing"),
    ):
        queries.write_text(text)
        with pytest.raises(InputError, match=said):
            curate(read_curation(recipe), chats={name: Scripted(name, good) for name in "abc"})


def test_the_documentation_has_every_key():
    from dataclasses import fields

    from kdkernels.curation import CurationConfig, TeacherConfig

    text = (Path(__file__).parents[2] / "docs/TWT.md").read_text()
    keys = {entry.name for kind in (CurationConfig, TeacherConfig) for entry in fields(kind)}
    assert len(keys) > 30 and [key for key in sorted(keys) if not re.search(rf"\b{key}\b", text)] == []
