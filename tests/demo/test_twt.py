"""The rehearsal of TwT: its task, its teachers' confidence, its stand-in for an embedding, and all in miniature."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdkernels.curation import Answer, Chat, Failure, read_curation
from kdkernels.curation.parse import parse
from kdkernels.curation.prompts import read_prompt
from kdkernels.demo.twt import run as rehearsal
from kdkernels.demo.twt.arms import ARMS, DATASETS, HERE
from kdkernels.demo.twt.report import render
from kdkernels.demo.twt.results import Measured, Results, Teacher, _survivors
from kdkernels.demo.twt.task import STYLES, Problem, lessons, problems, rationale, write_data
from kdkernels.demo.twt.teachers import Confident, Words
from kdkernels.training.recipe.stages import parse_stages, read_recipes

PROBLEM = Problem(8, (("+", 5), ("*", 2), ("-", 3)), "Q?")


def test_a_problem_is_explained_in_each_style():
    full = {style: rationale(PROBLEM, style) for style in STYLES}
    short = {style: rationale(PROBLEM, style, short=True) for style in STYLES}
    assert full == {
        "equations": "8+5=3\n3*2=6\n6-3=3",
        "sentences": "8 plus 5 is 3, 3 times 2 is 6, 6 minus 3 is 3",
        "values": "at 8, now 3, now 6, now 3",
    }
    assert short == {
        "equations": "8+5=3*2=6-3=3",
        "sentences": "plus 5 is 3, times 2 is 6, minus 3 is 3",
        "values": "3, 6, 3",
    }
    assert PROBLEM.answer() == "3"
    asked = problems()
    assert len({(one.start, one.steps) for one in asked}) == len(asked) == 10 * 12**3
    assert asked[0] == problems()[0] != problems(1)[0]
    one = next(one for one in asked if one.start == 8 and one.steps == PROBLEM.steps)
    assert one.question.startswith("A one-digit ") and " shows 8, " in one.question
    assert [word in one.question for word in (" five, ", " twofold, ", " three. ")] == [True] * 3


def test_a_teacher_learns_to_answer_and_to_rewrite_in_the_students_style():
    rng, seen = random.Random(0), Counter()
    for _ in range(60):
        answer, rewriting = lessons(PROBLEM, "equations", rng)
        assert answer == {"prompt": "Q?\n", "response": "8+5=3\n3*2=6\n6-3=3\nAnswer: 3"}
        head, _, student = rewriting["prompt"].partition("> ")
        assert head == "Q?\n8+5=3\n3*2=6\n6-3=3\n"
        style = next(style for style in STYLES if rewriting["response"] == rationale(PROBLEM, style, short=True))
        right = student == rationale(PROBLEM, style) + "\n"
        assert right or len(student) == len(rationale(PROBLEM, style)) + 1
        seen[style, right] += 1
    assert len(seen) == 6, "of each style, right ones and such with a slip"


def test_no_problem_is_in_two_files(tmp_path):
    write_data(tmp_path, {"teacher": 30, "student": 30, "queries": 30, "test": 30})
    files = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    questions = {
        "teacher": {one["prompt"].splitlines()[0] for one in files["values"]},
        "student": {one["prompt"].splitlines()[0] for one in files["student"]},
        "queries": {one["query"] for one in files["queries"]},
        "test": {one["query"] for one in files["test"]},
    }
    assert [len(one) for one in questions.values()] == [30] * 4 and len(set.union(*questions.values())) == 120


class Said(Chat):
    identity, batch = {"model": "said"}, 2

    def answers(self, conversations):
        return [
            Failure("gone", "x", final=True) if one == "gone" else Answer(one, 1, 1, -0.05) for one in conversations
        ]


def test_a_small_teachers_confidence_is_how_probable_its_tokens_were():
    marked, bare, gone = Confident(Said()).answers(["98+5=03\n03*2=06\nAnswer: 06", "98+5", "gone"])
    parsed = parse(marked, read_prompt(str(HERE / "answer.toml")))
    assert (parsed.rationale, parsed.label) == ("98+5=03\n03*2=06", "06")
    assert parsed.confidence == pytest.approx(math.exp(-0.05), abs=1e-4)
    assert bare.text == "98+5" and isinstance(gone, Failure)


def test_texts_are_as_alike_as_their_words():
    table = Words().similarities(["8+5=3", "8 + 5=3", "8 plus 5 is 3", "at now"])
    assert table[0][1] == pytest.approx(1) and table[0][2] == pytest.approx(0.6) and table[0][3] == 0


def test_every_arm_has_a_recipe_of_its_own(tmp_path):
    for arm, (dataset, names, start) in ARMS.items():
        path = rehearsal._recipe(tmp_path, 2, arm)
        stages = parse_stages(path)
        assert [stage.name for stage in stages] == list(names)
        for stage in stages:
            config = stage.config
            assert config.run.output == f"{tmp_path}/seed-2/{arm}/{stage.name}" and config.run.seed == 2
            assert config.train.steps == (100 if stage.name == "label" else 60)
            assert ("{rationale}" in config.data.response) == (stage.target != "label")
        assert stages[0].config.data.train == f"{tmp_path}/curated/{dataset}/dataset.jsonl"
        assert stages[0].config.student.path == f"{tmp_path}/{'seed-2/' + start if start else 'student'}/final"
    assert {dataset for dataset, _, _ in ARMS.values()} == DATASETS.keys()


def test_the_report_says_what_came_out():
    def measured(share, tokens):
        right = np.zeros((3, 20))
        right[:, : round(20 * share)] = 1
        return Measured(right, np.full((3, 20), float(tokens)))

    table = {"full": measured(0.4, 20), "compressed": measured(0.6, 10), "label": measured(0.7, 6)}
    stages = {arm: {name: table[name] for name in names} for arm, (_, names, _) in ARMS.items()}
    stages["single"] = {**table, "label": measured(1.0, 6)}
    teacher = Teacher("equations", 30, 1, 0.9, 0.5, 1.0, 12, 14.0)
    survivors = Counter({3: 7, 0: 1})
    results = Results(measured(0.1, 18), stages, 6.0, [teacher], survivors, {"twt": (40, 0.95)}, {"twt": Counter(a=3)})
    text = render(results, 100, 150, 2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["TwT, full", "40.0%"] in [row[:2] for row in rows] and "which is the length of the label alone" in text
    assert "- 3 teachers: 7\n- 2 teachers: 0\n- 1 teachers: 0\n- 0 teachers: 1\n" in text
    assert "| 50.0% | 100.0% | 12 | 14.0 |" in text and "100 seconds, 150 CPU seconds," in text
    claims = {row[0]: (row[1], row[3]) for row in rows if len(row) == 4}
    assert claims["the compressed stage is more often right than the full one"] == ("+20.0", "holds")
    assert claims["three teachers beat the best single one"][1] == "fails"
    assert claims["with rejection sampling beats without"] == ("+0.0", "undecided")
    assert "NOT" in render(Results(results.before, stages, 5.0, [teacher], Counter(), {}, {}), 100, 150, 2)


def test_queries_are_counted_by_the_teachers_above_the_threshold():
    sure, unsure, unread = {"label": "1", "confidence": 0.95}, {"label": "1", "confidence": 0.94}, {"label": None}
    answers = {1: (sure, sure, sure), 2: (sure, unsure, unread), 3: (unread, unsure, unsure), 4: (sure, sure, sure)}
    decisions = [{"line": line, **one} for line, ones in answers.items() for one in ones]
    assert _survivors(decisions, 0.95) == {3: 2, 1: 1, 0: 1}


@pytest.mark.slow
def test_the_rehearsal_in_miniature(tmp_path, monkeypatch):
    """All of it, untrained as the models are; and the same again takes what is there."""
    sizes = {"teacher": 40, "student": 12, "queries": 24, "test": 10}
    monkeypatch.setattr(rehearsal, "write_data", lambda place: write_data(place, sizes))
    monkeypatch.setattr(rehearsal, "STEPS", dict.fromkeys(STYLES, 60))
    monkeypatch.setitem(DATASETS["twt"], "threshold", 0.0)
    monkeypatch.setitem(DATASETS["single"], "threshold", 0.0)
    report = rehearsal.rehearse(tmp_path / "twt", 1, ["train.batch_size=8", "train.micro_batch_size=8"])
    assert report.is_file() and (tmp_path / "twt" / "stages.png").is_file()
    finals = {path: path.stat().st_mtime_ns for path in (tmp_path / "twt").rglob("final")}
    assert len(finals) == 3 + 1 + sum(len(names) for _, names, _ in ARMS.values())
    rehearsal.rehearse(tmp_path / "twt", 1, ["train.batch_size=8", "train.micro_batch_size=8"])
    assert finals == {path: path.stat().st_mtime_ns for path in (tmp_path / "twt").rglob("final")}


def test_the_recipes_say_what_curation_and_training_need(tmp_path, monkeypatch):
    for style in STYLES:
        (tmp_path / "teachers" / style / "final").mkdir(parents=True)
    write_data(tmp_path / "data", {"teacher": 6, "student": 6, "queries": 6, "test": 6})
    config = read_curation(str(rehearsal._recipe(tmp_path, 0, "twt")))
    assert [one.name for one in config.teachers] == list(STYLES) and config.threshold == 0.95
    assert Path(config.queries).is_file() and read_recipes([]) == []
