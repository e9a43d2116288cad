"""report.md: every line against logs whose numbers are known, and against runs."""

import json
import shutil
import sys

import pytest

from kdkernels.training import train
from kdkernels.training.cli import main
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import read_metrics
from kdkernels.training.run.report import render_report

from .test_processes import finish, start


class Data:
    """What the report takes of Examples."""

    first = "first: 1+1= -> 2."

    def __str__(self):
        return "train.jsonl: 32 examples"


@pytest.fixture
def render(load, tmp_path):
    """render(lines, *overrides, start=0, peaks=(9.0,)): the report of a log with these lines."""

    def render(lines, *overrides, start=0, peaks=(9.0,)):
        config = load(*overrides)
        run = RunDirectory(config.run.output)
        run.root.mkdir(exist_ok=True)
        run.metrics.write_text("".join(json.dumps({"step": i} | line) + "\n" for i, line in lines.items()))
        return render_report(run, config, [Data()], start, peaks).splitlines()

    return render


def test_skipped_steps_count_apart(render):
    step = {"tokens": 10, "time/student": 1.5, "skipped_steps": 0}
    rollout = {"tokens": 0, "time/rollout": 0.5, "skipped_steps": 1, "loss": None}  # failed before its student
    lines = {1: step, 2: rollout, 3: step | {"tokens": 7, "skipped_steps": 2, "loss": None}}
    lines |= {4: step | {"tokens": 20, "time/rollout": 0.25, "skipped_steps": 2}}
    report = render(lines, "train.steps=4")
    assert report[2] == "- 2 steps of 4 responses, 30 response tokens"
    assert report[3] == "- 2 more steps skipped, their loss or gradient was not finite: 2, 3"
    expected = "- seconds in the steps, evaluations and checkpoints not counted: 5.2 (student 4.5, rollout 0.8)"
    assert report[4] == expected
    assert report[5] == "- peak resident memory: 9 MiB"
    assert report[6] == "- train.jsonl: 32 examples"
    assert not any("held-out" in line for line in report)


def test_a_log_that_lost_lines_says_so(render):
    report = render({1: {"tokens": 10}, 3: {}}, "train.steps=3")
    assert report[2:4] == [
        "- 2 steps of 4 responses, 10 response tokens",
        "- of 3 steps: the log has lost the others, which nothing below counts",
    ]
    assert "0.0 ()" in report[4]


def test_evaluations_that_are_missing_or_not_finite(render, tmp_path):
    data = (f"evaluation.data={tmp_path / 'test.jsonl'}", 'evaluation.metrics=["cross_entropy"]', "evaluation.limit=5")
    first = {"evaluation/a": 1.0, "evaluation/b": None, "evaluation/c": 2.0}
    last = {"evaluation/a": 0.25, "evaluation/b": 3.0, "evaluation/d": None}
    report = render({0: first, 1: {"tokens": 1}, 2: {"tokens": 1, "evaluation/a": 7.0}, 3: {"tokens": 1} | last}, *data)
    table = report[report.index("| held-out | step 0 | step 3 | change |") :]
    assert table[2:] == [
        "| a | 1.0000 | 0.2500 | -0.7500 |",
        "| b | not finite | 3.0000 |  |",
        "| c | 2.0000 | not measured |  |",
        "| d | not measured | not finite |  |",
    ]
    assert "- evaluated on the first 5 of the held-out examples at most" in report


def test_several_processes_and_a_resumed_run_say_what_their_numbers_are_of(render):
    report = render({1: {"tokens": 10, "time/student": 1.0}}, "train.steps=1", start=7, peaks=(100.4, 50.0))
    assert "- peak resident memory since it was resumed after step 7: 100 MiB, 50 MiB (processes 0 to 1)" in report
    assert "- seconds in the steps, evaluations and checkpoints not counted, on process 0: 1.0 (student 1.0)" in report


def test_a_resumed_run_reports_all_of_its_steps(load):
    whole = train(load("train.steps=4", "checkpoint.every=2")).output
    before = (whole / "report.md").read_text().splitlines()
    shutil.rmtree(whole / "final")
    again = train(load("train.steps=4", "checkpoint.every=2"), resume=True).output
    after = (again / "report.md").read_text().splitlines()
    tokens = sum(line["tokens"] for line in read_metrics(again / "metrics.jsonl"))
    assert before[2] == after[2] == f"- 4 steps of 4 responses, {tokens} response tokens"
    assert before[3] == after[3]  # the seconds of all sessions: no step was taken again
    assert before[4].startswith("- peak resident memory: ")
    assert after[4].startswith("- peak resident memory since it was resumed after step 4: ")


@pytest.mark.slow
def test_two_processes_report_both(recipe, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    command = (*launcher, "kdkernels", "train", str(recipe), "--set=train.micro_batch_size=1")
    finish(start(command, cwd=tmp_path), tmp_path)
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.count(" MiB") == 2 and "(processes 0 to 1)" in report and ", on process 0: " in report


def test_a_dry_run_of_a_resumed_run_writes_nothing(recipe, load, tmp_path, capsys):
    shutil.rmtree(train(load()).final)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["train", str(recipe), "--resume", "--dry-run"]) == 0
    assert "disk: at most" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
