"""From queries to a dataset: every decision is recorded, and nothing depends on timing, faults or kills."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai")

from faulty_server import faulty_server, wait_for

from kdkernels.curation import curate, read_curation
from kdkernels.curation.cli import _run
from kdkernels.data.texts import render
from kdkernels.errors import InputError, ServerError

from .oracle import oracle, read_lines, way_of, write_recipe

FILES = ("dataset.jsonl", "decisions.jsonl", "failures.jsonl", "report.md", "manifest.json")


def contents(root):
    return {name: (root / "out" / name).read_bytes() for name in FILES}


def test_every_decision_is_recorded(tmp_path):
    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, queries=40, t_price_out=1000.0)
        assert curate(read_curation(recipe)) == tmp_path / "out/dataset.jsonl"
        assert len(server.requests) == 120
    decisions = read_lines(tmp_path / "out/decisions.jsonl")
    assert [(one["line"], one["teacher"]) for one in decisions] == [
        (line, teacher) for line in range(1, 41) for teacher in ("ann", "ben", "carla")
    ]
    whys = Counter()
    for one in decisions:
        way = way_of(one["teacher"], one["line"] - 1)
        expected = way if way is None or way.startswith("confidence below") else f"unreadable: {way}"
        whys[one["why"]] += 1
        assert one["why"] == expected or (way is None and one["why"] in ("kept", "not in the pair drawn"))
    dataset = read_lines(tmp_path / "out/dataset.jsonl")
    kept = [(one["line"], one["teacher"]) for one in decisions if one["kept"]]
    assert [(one["line"], one["teacher"]) for one in dataset] == kept
    assert len(whys) == 10 and whys["not in the pair drawn"] > 3
    counts = Counter(Counter(one["line"] for one in dataset).values())
    assert set(counts) == {1, 2}  # never three
    assert all(one["label"] == str(one["line"] - 1 + (one["line"] - 1) % 7) for one in dataset)
    assert dataset[0]["response"] == f"{dataset[0]['rationale']}\n\nAnswer: {dataset[0]['label']}"
    assert "🧮" in dataset[0]["rationale"]
    failures = read_lines(tmp_path / "out/failures.jsonl")
    assert Counter(one["why"] for one in failures) == {w: n for w, n in whys.items() if w.startswith("unreadable")}
    report = (tmp_path / "out/report.md").read_text()
    assert "| ann | 40 | 40 |" in report and "| 4000 | 280 | 0.2800 |" in report
    assert all(f"| {why} |" in report for why in whys)


def test_the_trainer_reads_it(tmp_path):
    with faulty_server(oracle) as server:
        dataset = curate(read_curation(write_recipe(tmp_path, server.url)))
    lines = list(render(str(dataset), "{query}\n", "{rationale}\nAnswer: {label}", ["<eos>"]))
    assert lines and all(prompt.endswith("?\n") and "Answer: " in response for _, prompt, response in lines)


@pytest.mark.parametrize("teachers", [["ann"], pytest.param(["ann", "ben", "carla"], marks=pytest.mark.slow)])
def test_faults_change_nothing(tmp_path, teachers):
    """200 queries, a tenth of the requests failing in every way in which servers fail."""
    roots = [tmp_path / name for name in ("sound", "faulty")]
    faults = random.Random(0).choices(
        ["ok", "500", "503", "429", "die", "cut", "garbage", "empty"], [90] + [10 / 7] * 7, k=2000
    )
    for root, planned in zip(roots, ([], faults), strict=True):
        root.mkdir()
        with faulty_server(oracle, planned) as server:
            curate(read_curation(write_recipe(root, server.url, queries=200, teachers=teachers)))
            failed = [fault for fault in planned[: len(server.requests)] if fault != "ok"]
            assert len(server.requests) == 200 * len(teachers) + len(failed) and bool(failed) == bool(planned)
    sound, faulty = map(contents, roots)
    assert sound["dataset.jsonl"] == faulty["dataset.jsonl"]
    assert sound["failures.jsonl"] == faulty["failures.jsonl"]
    heard = Counter(fault for one in read_lines(roots[1] / "out/decisions.jsonl") for fault in one["faults"])
    assert heard.total() == len(failed)
    expected = Counter({"500": "status 500", "503": "status 503", "429": "status 429"}.get(one) for one in failed)
    assert all(heard[kind] == times for kind, times in expected.items() if kind)
    assert heard["broken JSON"] == sum(one in ("garbage", "empty") for one in failed)
    assert heard["connection"] == sum(one in ("die", "cut") for one in failed)


def test_an_interrupted_run_goes_on(tmp_path):
    """A kill leaves a journal up to some byte: after each of many such bytes, the same comes out, and no answer that is
    there is asked for again.
    """
    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, queries=12, teachers=["ann"])
        curate(read_curation(recipe))
        whole, journal = contents(tmp_path), (tmp_path / "out/answers.jsonl").read_bytes()
        cuts = random.Random(1)
        for cut in [0, 1, len(journal) - 1, len(journal), *(cuts.randrange(len(journal)) for _ in range(4))]:
            for name in FILES[:-1]:
                (tmp_path / "out" / name).unlink()
            (tmp_path / "out/answers.jsonl").write_bytes(journal[:cut])
            (tmp_path / "out/unfinished-dataset.jsonl").write_text("half of a li")
            server.requests.clear()
            curate(read_curation(recipe))
            assert len(server.requests) == 12 - journal[:cut].count(b"\n")
            assert contents(tmp_path) == whole
            assert not list((tmp_path / "out").glob("unfinished-*"))


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path, monkeypatch):
    """200 queries of three teachers behind a server of which a tenth of the answers fail; kill -9 at ten moments."""
    monkeypatch.setenv("TEACHER_KEY", "sk-planted-4711-0815")
    moments, answers = random.Random(5), tmp_path / "out/answers.jsonl"

    def slow(path, body):
        time.sleep(0.02)
        return oracle(path, body)

    faults = moments.choices(["ok", "500", "429", "die", "cut", "garbage"], [90, 2, 2, 2, 2, 2], k=9000)
    with faulty_server(slow, faults) as server:
        recipe = write_recipe(tmp_path, server.url, queries=200, t_key_variable="TEACHER_KEY")
        command = [sys.executable, "-m", "kdkernels", "curate", str(recipe)]
        for _ in range(10):
            size = answers.stat().st_size if answers.exists() else 0
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
                more = moments.randrange(0, 60_000)
                wait_for(lambda size=size, more=more: answers.exists() and answers.stat().st_size > size + more, 120)
                time.sleep(moments.uniform(0, 0.1))
                assert run.poll() is None and b"planted" not in Path(f"/proc/{run.pid}/cmdline").read_bytes()
                run.kill()
        done = subprocess.run([*command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "planted" not in done.stdout + done.stderr, done.stderr
        interrupted, asked = (
            contents(tmp_path),
            len(server.requests) - sum(f != "ok" for f in faults[: 9000 - len(server.faults)]),
        )
    assert 600 <= asked <= 600 + 10 * 12  # what was under way when it was killed, at most
    lines = [one for line in read_lines(answers) for one in line["answers"] if "text" in one]
    assert len({one["address"] for one in lines}) == len(lines) == 600
    with faulty_server(oracle) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        recipe.write_text(write_recipe(whole, server.url, queries=200).read_text())
        curate(read_curation(recipe))
    for name in ("dataset.jsonl", "failures.jsonl"):
        assert (whole / "out" / name).read_bytes() == interrupted[name]


def test_answers_are_shared_between_runs(tmp_path):
    with faulty_server(oracle) as server:
        curate(read_curation(write_recipe(tmp_path, server.url, queries=20)))
        asked, first = len(server.requests), contents(tmp_path)
        shared = {"answers": str(tmp_path / "out/answers.jsonl"), "output": str(tmp_path / "other")}
        recipe = write_recipe(tmp_path, server.url, queries=20)
        config = read_curation(recipe, [f"curation.{key}={value}" for key, value in shared.items()])
        curate(config)
        assert (tmp_path / "other/dataset.jsonl").read_bytes() == first["dataset.jsonl"]
        for quality in ("none", "correct"):
            shared["output"] = str(tmp_path / quality)
            changes = {**shared, "quality": quality, "diversity": "none"}
            curate(read_curation(recipe, [f"curation.{key}={value}" for key, value in changes.items()]))
        assert len(server.requests) == asked
    kept = [len(read_lines(tmp_path / name / "dataset.jsonl")) for name in ("out", "none", "correct")]
    assert kept[0] < kept[1] == kept[2]  # an answer below the threshold is right, too


def test_log_probabilities_are_the_score(tmp_path):
    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, teachers=["ann"], quality="log_probability", t_logprobs=True)
        curate(read_curation(recipe))
        with pytest.raises(InputError, match="no answer is kept"):
            curate(read_curation(recipe, [f"curation.output={tmp_path}/strict", "curation.threshold=0.99"]))
    for one in read_lines(tmp_path / "out/dataset.jsonl"):
        assert one["logprob"] == pytest.approx(-0.02)
    scores = {one["score"] for one in read_lines(tmp_path / "out/decisions.jsonl")} - {None}
    assert [round(score, 6) for score in scores] == [0.980199]


def test_duplicates_are_asked_once(tmp_path):
    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, queries=3, teachers=["ann"], quality="none")
        queries = tmp_path / "queries.jsonl"
        queries.write_text(queries.read_text() * 2)
        curate(read_curation(recipe))
        assert len(server.requests) == 3
        decisions = read_lines(tmp_path / "out/decisions.jsonl")
        again = [(one["line"], one["of"]) for one in decisions if one["why"] == "duplicate query"]
        assert again == [(4, 1), (5, 2), (6, 3)]
        assert "had come before: 3" in (tmp_path / "out/report.md").read_text()
        queries.write_text(queries.read_text() + json.dumps({"question": "What is 1 plus 1?", "answer": "11"}) + "\n")
        with pytest.raises(InputError, match=r"line 7: the query is that of line 2, whose label is '2'"):
            curate(read_curation(recipe, [f"curation.output={tmp_path}/other"]))


def test_a_dead_teacher_ends_the_run_and_keeps_what_was_answered(tmp_path):
    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, queries=30, t_retries=1)
        server.faults = ["ok"] * 40
        server.faults += ["503"] * 400
        with pytest.raises(ServerError, match="no answer: 10 questions in a row, the last time with status 503"):
            curate(read_curation(recipe))
        answers = [one for line in read_lines(tmp_path / "out/answers.jsonl") for one in line["answers"]]
        assert sum("text" in one for one in answers) == 40
        server.faults.clear()
        server.requests.clear()
        curate(read_curation(recipe))
        assert len(server.requests) == 90 - 40
        decisions = read_lines(tmp_path / "out/decisions.jsonl")
        assert len(decisions) == 90 and not [one for one in decisions if one["why"].startswith("no answer")]


def test_an_answer_that_never_comes_is_a_decision_too(tmp_path):
    def some(path, body):
        return {"error": "odd"} if b"What is 3 plus" in body else oracle(path, body)

    with faulty_server(some) as server:
        recipe = write_recipe(tmp_path, server.url, queries=6, t_retries=2)
        curate(read_curation(recipe))
        assert len(server.requests) == 15 + 3 * 3
        decisions = read_lines(tmp_path / "out/decisions.jsonl")
        assert [one["why"] for one in decisions if one["line"] == 4] == ["no answer: wrong schema"] * 3
        assert "3 were not given: the same again asks for them" in (tmp_path / "out/report.md").read_text()
        server.requests.clear()
        curate(read_curation(recipe))
        assert len(server.requests) == 9


def test_the_command(tmp_path, capsys):
    import argparse

    with faulty_server(oracle) as server:
        recipe = write_recipe(tmp_path, server.url, queries=4)

        def command(*overrides, dry_run=False):
            return _run(argparse.Namespace(recipe=str(recipe), set=list(overrides), dry_run=dry_run))

        assert command(dry_run=True) == 0 and not server.requests and not (tmp_path / "out").exists()
        assert "first of 4 queries, as each of 3 teachers" in (said := capsys.readouterr().out)
        assert "What is 0 plus 0?" in said and "correctness (50 %)" in said
        assert command() == 0
        assert "answers to 4 of 4 queries are kept.\ndataset: " in (said := capsys.readouterr().out)
        assert said.endswith(f"report: {tmp_path}/out/report.md\n")
        assert command("curation.threshold=2") == 2
        assert "expected a number from 0 to 1, got 2" in capsys.readouterr().err
        server.always = "401"
        assert command("curation.output=" + str(tmp_path / "other")) == 6
        assert "teacher " in (said := capsys.readouterr().err) and "status 401" in said
