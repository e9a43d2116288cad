"""What a run does when the disk is full, when it is killed and when it is asked to end (everywhere: test_drills)."""

import signal

import pytest

from .conftest import only_line

# what cannot be written, and the path that the message names
FILES = {
    "run.lock": "run.lock",
    "unfinished-config.toml": "config.toml",
    "unfinished-tokenizer/": "tokenizer",
    "unfinished-inputs.json": "inputs.json",
    "/metrics.jsonl": "metrics.jsonl",
    "events.out": "tensorboard/events.out",
    "unfinished-evaluation-000002": "evaluation-000002.jsonl",
    "unfinished-step-000002/shared.pt": "checkpoints/step-000002",
    "unfinished-step-000002/process-00000.pt": "checkpoints/step-000002",
    "unfinished-step-000002/metrics.jsonl": "checkpoints/step-000002",
    "unfinished-step-000002/progress.json": "checkpoints/step-000002",
    "unfinished-final/.tmp": "final",  # as safetensors writes
    "unfinished-final/config.json": "final",
    "unfinished-final/tokenizer.json": "final",
    "unfinished-report.md": "report.md",
}


# the others are slow only because there are many
ALWAYS = ("run.lock", "/metrics.jsonl", "events.out", "unfinished-step-000002/shared.pt", "unfinished-final/.tmp")


@pytest.mark.parametrize(
    "match", [one if one in ALWAYS else pytest.param(one, marks=pytest.mark.slow) for one in FILES]
)
def test_a_full_disk_is_told_and_costs_nothing(task, match):
    """Exit status 3 and one line with path and reason; what was half written does not keep the disk full; then the run
    comes to the same end as one that nothing disturbed.
    """
    name = f"full-{list(FILES).index(match)}"
    answer = task.run(name, fault=["full", match, 2 if match == "/metrics.jsonl" else 1])
    run = task.root / name
    assert answer["statuses"] == [3], answer["output"]
    said = only_line(answer)
    assert f"kdkernels: {run / FILES[match]}" in said and "no space left on the disk" in said
    assert not list(run.rglob("unfinished-*"))
    if match.startswith("unfinished-final"):
        newest = run / "checkpoints" / "step-000003"
        assert f"--resume writes {run / 'final'}: all steps are trained, and are in {newest}" in said
    began = (run / "config.toml").exists()
    assert began == (match not in ("run.lock", "unfinished-config.toml"))
    answer = task.run(name, *(["--resume"] if began else []))
    assert answer["statuses"] == [0], answer["output"]
    if match.startswith("unfinished-final"):
        assert "step 3/3" not in answer["output"]  # nothing was trained again
    task.check_left_by(name)


@pytest.mark.parametrize("at", [1, 60])
def test_a_kill_in_the_middle_of_a_write_costs_nothing(task, at):
    name = f"killed-{at}"
    answer = task.run(name, fault=["kill", name, at])
    assert answer["statuses"] == [-signal.SIGKILL], answer["output"]
    resume = ["--resume"] if (task.root / name / "config.toml").exists() else []
    assert task.run(name, *resume)["statuses"] == [0]
    task.check_left_by(name)


LONG = ("--set=train.steps=100", "--set=checkpoint.every=40", "--set=evaluation.every=0")
ONE_AND_TWO = [pytest.param(1, marks=pytest.mark.slow), 2]


@pytest.mark.parametrize("processes", ONE_AND_TWO)
def test_sigterm_ends_a_run_after_the_step_under_way(task, processes):
    name = f"terminated-{processes}"
    begun = str(task.root / name / "checkpoints" / "step-000040")
    answer = task.run(name, *LONG, processes=processes, signal=[signal.SIGTERM, begun])
    assert answer["statuses"] == [0] * processes, answer["output"]
    newest = max((task.root / name / "checkpoints").iterdir())
    step = int(newest.name.removeprefix("step-"))
    assert 40 < step < 100 and step % 40
    assert only_line(answer) == f"kdkernels: stopped by SIGTERM after step {step}; --resume goes on from {newest}"
    assert not (task.root / name / "final").exists()
    answer = task.run(name, *LONG, "--resume", processes=processes)
    assert answer["statuses"] == [0] * processes, answer["output"]
    task.check_left_by(name, *LONG, processes=processes)


def test_sigterm_before_the_first_step_is_told_too(task):
    answer = task.run("early", signal=[signal.SIGTERM, str(task.root / "early" / "run.lock")])
    assert answer["statuses"] == [0]
    assert (
        only_line(answer) == "kdkernels: stopped by SIGTERM before training began; start the run again: nothing was "
        "trained yet"
    )
    assert not (task.root / "early").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_says_so_in_a_line(task, processes):
    name = f"interrupted-{processes}"
    begun = str(task.root / name / "checkpoints" / "step-000040")
    answer = task.run(name, *LONG, processes=processes, signal=[signal.SIGINT, begun])
    assert answer["statuses"] == [130] * processes, answer["output"]
    assert only_line(answer).startswith("kdkernels: interrupted; --resume goes on from ")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_disk_that_is_full_on_another_process(task, stage):
    """All processes end, with the same status, and the last checkpoint is sound."""
    match = "unfinished-step-000002/process-00001.pt"
    job = {"processes": 2, "rank": 1, "fault": ["full", match, 1]}
    name, setting = f"full-on-one-{stage}", f"--set=deepspeed.zero_stage={stage}"
    answer = task.run(name, setting, **job)
    assert answer["statuses"] == [3, 3], answer["output"]
    assert answer["output"].count("checkpoints/step-000002: no space left on the disk") == 2
    assert [path.name for path in (task.root / name / "checkpoints").iterdir()] == ["step-000001"]
    answer = task.run(name, setting, "--resume", processes=2)
    assert answer["statuses"] == [0, 0], answer["output"]
    task.check_left_by(name, setting, processes=2)


def test_statuses_are_documented(worker):
    """In the help of the command."""
    printed = worker.run("--help")["output"]
    for line in ("exit status", "  0    ", "  1    ", "  2    ", "  3    ", "  4    ", "  130  "):
        assert line in printed


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_an_output_that_nobody_takes_is_told(task, arguments):
    """The lines for people may go to a full disk too."""
    answer = task.run("-".join(("said", *arguments)), *arguments, stdout="/dev/full")
    assert answer["statuses"] == [3]
    assert only_line(answer).startswith("kdkernels: standard output: no space left on the disk")
