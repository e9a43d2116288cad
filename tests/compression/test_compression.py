"""Compressed rationales: who is asked what, what becomes of the records, and what survives an interruption."""

import json
import shutil

import pytest

from kdkernels.compression import TeacherCompressor
from kdkernels.compression.requests import HERE, Unusable, read_request
from kdkernels.compression.student import rationale
from kdkernels.curation import Failure
from kdkernels.errors import InputError, ServerError
from kdkernels.rollouts import LocalSampler
from kdkernels.training import run_stages
from kdkernels.training.recipe.stages import ReasoningConfig

from .conftest import SHORT, Rule, lines, make, write


def teachers(reply=None):
    return {name: Rule(name, reply) for name in ("a", "b")}


def run(path, chats, *overrides):
    return run_stages([path], [*SHORT, *overrides], TeacherCompressor(chats))


def student_answers(root, stage="short"):
    """What the student wrote, by the record's number."""
    files = sorted((root / "run" / "compressions" / stage / "answers").iterdir())
    return {one["line"]: one["text"] for file in files for one in lines(file)}


def test_each_teacher_rewrites_its_own_rationales_for_what_the_student_writes(recipe, tmp_path):
    chats = teachers()
    results = run(recipe, chats)
    assert [result.output.name for result in results] == ["full", "short", "label"]
    source, made = lines(tmp_path / "train.jsonl"), lines(tmp_path / "run" / "compressions" / "short" / "train.jsonl")
    answers = student_answers(tmp_path)
    assert len(source) == 32 and answers.keys() == set(range(1, 33)) and len(set(answers.values())) > 1
    assert [{**one, "rationale": two["question"]} for one, two in zip(source, source, strict=True)] == made
    heard = {name: {one[0]["content"]: one for one in chat.heard} for name, chat in chats.items()}
    for number, record in enumerate(source, start=1):
        query, own, request = (turn["content"] for turn in heard[record["teacher"]][record["question"]])
        assert (query, own) == (record["question"], record["rationale"])
        assert f"<student>\n{answers[number].strip()}\n</student>" in request and "{" not in request
    assert [len(chat.heard) for chat in chats.values()] == [16, 16]
    decisions = lines(tmp_path / "run" / "compressions" / "short" / "decisions.jsonl")
    assert [one["line"] for one in decisions] == list(range(1, 33))
    assert {one["outcome"] for one in decisions} == {"rewritten"}
    # the stage learns them, and the last one the labels alone
    tokens = [json.loads((one.output / "metrics.jsonl").read_text().splitlines()[1])["tokens"] for one in results]
    assert tokens[0] > tokens[1] > tokens[2]


def test_the_student_answers_with_the_model_of_the_stage_before(trained):
    make(trained, teachers())
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    final = trained.parent / "run" / "full" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), PreTrainedTokenizerFast.from_pretrained(final)
    source, answers = lines(trained.parent / "train.jsonl"), student_answers(trained.parent)
    for number in (1, 2, 17):
        prompt = tokenizer(source[number - 1]["question"], add_special_tokens=False)["input_ids"]
        [ids] = LocalSampler(model, tokenizer).generate([prompt], 14, greedy=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == answers[number]


def test_another_round_compresses_what_the_first_one_made(trained):
    root, last = trained.parent, '[[stages]]\nname = "label"'
    text = trained.read_text().replace(last, f'[[stages]]\nname = "shorter"\ntarget = "compressed"\n{last}')
    trained.write_text(text)
    chats = teachers(lambda query, own, request: f"<rationale>{own[:-1]}</rationale>")
    first = make(trained, chats)
    shutil.copytree(root / "run" / "full", root / "run" / "short")  # as if the second stage were trained
    second = make(trained, chats, stage=2)
    places = [root / "train.jsonl", first / "train.jsonl", second / "train.jsonl"]
    rounds = [[one["rationale"] for one in lines(place)] for place in places]
    assert rounds[1] == [one[:-1] for one in rounds[0]] and rounds[2] == [one[:-2] for one in rounds[0]]
    assert [chats["a"].heard[i][1]["content"][:3] for i in (0, 16)] == ["2+0"] * 2


@pytest.mark.parametrize(("unusable", "left"), [("keep", 32), ("drop", 16)])
def test_what_cannot_be_used_is_counted(trained, unusable, left):
    chats = teachers()
    chats["b"].reply = lambda query, own, request: "none"
    place = make(trained, chats, f'reasoning.unusable="{unusable}"')
    made, source = lines(place / "train.jsonl"), lines(trained.parent / "train.jsonl")
    assert len(made) == left
    assert [one for one in made if one["teacher"] == "b"] == [
        one for one in source if one["teacher"] == "b" and unusable == "keep"
    ]
    assert json.loads((place / "counts.json").read_text()) == {"rewritten": 16, "not between the two marks": 16}


def test_a_student_without_a_rationale_leaves_the_teachers(trained):
    chats = teachers()
    with pytest.raises(InputError, match="no record is left of 32"):
        make(trained, chats, "reasoning.pattern='(none)'", 'reasoning.unusable="drop"')
    shutil.rmtree(trained.parent / "run" / "compressions")
    place = make(trained, chats, "reasoning.pattern='(none)'")
    assert lines(place / "train.jsonl") == lines(trained.parent / "train.jsonl")
    assert json.loads((place / "counts.json").read_text()) == {"no rationale of the student": 32}
    assert not chats["a"].heard


def test_a_fixed_length_asks_no_student(trained):
    def reply(query, own, request):
        return "<rationale>a b c</rationale>" if own[0] == "0" else "<rationale>1 2</rationale>"

    chats = teachers(reply)
    place = make(trained, chats, 'reasoning.compressor="length"', "reasoning.words=2")
    assert not (place / "answers").exists()
    counts = json.loads((place / "counts.json").read_text())
    zeros = sum(one["rationale"][0] == "0" for one in lines(trained.parent / "train.jsonl"))
    assert counts == {"rewritten": 32 - zeros, "too many words": zeros} and zeros
    assert "at most 2 words" in chats["a"].heard[0][2]["content"]


def test_a_teacher_without_a_reply(trained):
    chats = teachers()
    chats["b"].answers = lambda conversations: [Failure("too long", "x", final=True) for _ in conversations]
    place = make(trained, chats)
    assert json.loads((place / "counts.json").read_text()) == {"rewritten": 16, "no reply: too long": 16}


class Killed(BaseException):
    pass


def test_nothing_is_lost_by_interruptions(trained, tmp_path, monkeypatch):
    """In the student's answering and in the rewriting: the same data, and no question twice."""
    other = write(shutil.copytree(trained.parent, tmp_path / "again"))
    expected = make(trained, teachers(lambda query, own, request: f"<rationale>{own[::-1]}</rationale>"))
    once, written = LocalSampler.generate, []

    def generate(self, prompts, *arguments, **options):
        if len(written) == 2:
            written.append(0)
            raise Killed
        written.append(len(prompts))
        return once(self, prompts, *arguments, **options)

    monkeypatch.setattr(LocalSampler, "generate", generate)

    def reply(query, own, request):
        if len(chats["a"].heard) + len(chats["b"].heard) > 20 and "dead" not in told:
            told.append("dead")
            raise Killed
        return f"<rationale>{own[::-1]}</rationale>"

    told, chats = [], teachers(reply)
    for _ in range(2):
        with pytest.raises(Killed):
            make(other, chats)
        assert not (other.parent / "run" / "compressions" / "short" / "train.jsonl").exists()
    place = make(other, chats)
    assert sum(written) == 32 and written.count(8) == 4, "no batch was written twice"
    heard = [one[0]["content"] for chat in chats.values() for one in chat.heard]
    assert len(set(heard)) == 32 and len(heard) <= 32 + 4, "but for what was under way"
    for name in ("train.jsonl", "decisions.jsonl", "counts.json"):
        assert (place / name).read_bytes() == (expected / name).read_bytes()
    make(other, chats)
    assert len(heard) == sum(len(chat.heard) for chat in chats.values()) and sum(written) == 32


def test_answers_that_are_there_stay_when_fewer_are_written_at_a_time(trained, tmp_path, monkeypatch):
    other = write(shutil.copytree(trained.parent, tmp_path / "again"))
    expected = make(trained, teachers())
    once, written = LocalSampler.generate, []

    def generate(self, prompts, *arguments, **options):
        if len(written) == 2:
            raise Killed
        written.append(len(prompts))
        return once(self, prompts, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(LocalSampler, "generate", generate)
        make(other, teachers())
    monkeypatch.setattr(LocalSampler, "generate", lambda *a, **k: written.append(len(a[1])) or once(*a, **k))
    place = make(other, teachers(), "reasoning.batch_size=5")
    assert written == [8, 8, 5, 5, 5, 1]
    assert student_answers(other.parent) == student_answers(trained.parent)
    assert (place / "train.jsonl").read_bytes() == (expected / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("query", "said"),
    [("{nothing}", "line 1: field 'nothing' of .reasoning. query is missing"), ("{question", "query: not a template")],
)
def test_a_query_that_cannot_be_filled_in_is_told_before_anything_is_trained(recipe, tmp_path, query, said):
    with pytest.raises(InputError, match=said):
        run(recipe, teachers(), f"reasoning.query={query}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (
            "teacher",
            "c",
            r"line 3: the rationale's teacher is 'c', which the recipe does not have: expected one of a, b",
        ),
        ("teacher", None, r"line 3: field 'teacher': expected a text that is not empty, got None"),
        ("rationale", " ", r"line 3: field 'rationale': expected a text that is not empty, got ' '"),
    ],
)
def test_records_that_cannot_be_compressed_are_told_before_anything_is_trained(recipe, tmp_path, field, value, said):
    records = lines(tmp_path / "train.jsonl")
    records[2][field] = value
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    with pytest.raises(InputError, match=said):
        run(recipe, teachers())
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_teachers_says_so(recipe, tmp_path):
    with pytest.raises(InputError, match=r"section \[curation\] is missing"):
        run(recipe, None)
    with pytest.raises(InputError, match=r"pattern: expected one group, got 2"):
        run(recipe, teachers(), "reasoning.pattern='(a)(b)'")
    assert not (tmp_path / "run").exists()


def test_compressions_of_something_else_are_refused(trained):
    chats = teachers()
    chats["b"].answers = lambda conversations: [Failure("no key", "x", stops=True) for _ in conversations]
    with pytest.raises(ServerError, match="teacher b"):
        make(trained, chats)
    with pytest.raises(InputError, match=r"compressions/short: .* made from something else: \[reasoning\] differ"):
        make(trained, teachers(), "reasoning.pattern='(?s)^(.+)='")
    with pytest.raises(InputError, match=r"something else: teachers differ"):
        make(trained, {**teachers(), "b": Rule("another")})
    make(trained, teachers())


def test_the_wordings_are_there_and_read_strictly(tmp_path):
    for compressor, needed in (("teacher", "student"), ("length", "words")):
        request = read_request(ReasoningConfig(label="", compressor=compressor))
        assert f"{{{needed}}}" in request.request and (HERE / f"{compressor}.toml").is_file()
        assert request.read("\n<rationale>\na\nb\n</rationale>\n") == "a\nb"
        replies = {
            "a": "not between",
            "<rationale>a": "not between",
            "<rationale>a</rationale><rationale>b</rationale>": "not between",
            "so: <rationale>a</rationale>": "text outside",
            "<rationale> </rationale>": "empty",
            "<rationale>\ud800</rationale>": "broken characters",
        }
        for reply, said in replies.items():
            with pytest.raises(Unusable, match=said):
                request.read(reply)
    own = tmp_path / "own.toml"
    own.write_text('marks = ["", ""]\nrequest = "{student}>{other} {a"\n')
    request = read_request(ReasoningConfig(label="", request=str(own)))
    assert request.ask({"student": "{label}", "label": "x"}) == "{label}>{other} {a" and request.read(" a ") == "a"
    for text, said in (
        ('marks = ["", ""]\nrequest = "x"', r"request: expected \{student\} in it"),
        ('marks = ["x", ""]\nrequest = "{student}"', "marks: expected two"),
        ('request = "{student}"', "key 'marks' is missing"),
    ):
        own.write_text(text)
        with pytest.raises(InputError, match=said):
            read_request(ReasoningConfig(label="", request=str(own)))


def test_the_last_rationale_of_an_answer_counts():
    assert rationale("(?s)T: (.*?)\nA", "T: a\nA T: b\nc\nA") == "b\nc"
    assert rationale("(.*)=", " =") is None and rationale("(x)", "y") is None
