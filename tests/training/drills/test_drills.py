"""The drills (`make drills`): whenever a run is killed, wherever its disk is full, nothing is lost, nothing is wrong.

Every run that was disturbed goes on with --resume and has to end with the weights and the log of an undisturbed one, to
the bit, with every checkpoint before it still there.
"""

import random
import signal
import threading

import pytest

from .conftest import Task, only_line
from .drill import Worker, compile_faults

pytestmark = pytest.mark.slow
LONG = ("--set=train.steps=60", "--set=checkpoint.every=2", "--set=evaluation.every=20")


def events(task, name: str, *arguments: str, **job) -> int:
    """How many times a run changes something on the disk."""
    answer = task.run(name, *arguments, fault=["off", name, 0], **job)
    assert answer["statuses"] == [0] * job.get("processes", 1), answer["output"]
    return answer["events"]


def go_on(task, name: str, *arguments: str, processes: int = 1) -> dict:
    """The answer of the run continued, or begun again where it had not begun."""
    resume = ["--resume"] if (task.root / name / "config.toml").exists() else []
    answer = task.run(name, *arguments, *resume, processes=processes)
    assert answer["statuses"] == [0] * processes, answer["output"]
    assert "damaged" not in answer["output"], answer["output"]
    return answer


def newest(task, name: str) -> str:
    return max((path.name for path in (task.root / name / "checkpoints").glob("step-*")), default="step-000000")


def test_a_kill_at_every_file_event(task):
    count = events(task, "every-count", "--set=train.steps=2")
    assert count > 100
    for at in range(1, count + 1):
        name = f"every-{at:04d}"
        answer = task.run(name, "--set=train.steps=2", fault=["kill", name, at])
        assert answer["statuses"] == [-signal.SIGKILL], (at, answer["output"])
        kept = int(newest(task, name).removeprefix("step-"))
        answer = go_on(task, name, "--set=train.steps=2")
        trained = [step for step in (1, 2) if f"step {step}/2" in answer["output"]]
        assert trained == [step for step in (1, 2) if step > kept], (
            at,
            answer["output"],
        )  # from the newest checkpoint on
        task.check_left_by(name, "--set=train.steps=2")


def test_a_disk_that_is_full_from_an_event_on(task):
    """From every second one, that is in every file more than once."""
    count = events(task, "full-count", "--set=train.steps=2")
    refused = 0
    for at in range(1, count + 1, 2):
        name = f"full-{at:04d}"
        answer = task.run(name, "--set=train.steps=2", fault=["full", name, at])
        assert answer["statuses"] in ([0], [3]), (at, answer["output"])  # what is left may need no space: a deletion
        if answer["statuses"] == [3]:
            refused += 1
            said = only_line(answer)
            assert f"{task.root / name}/" in said and "no space left on the disk" in said, at
            go_on(task, name, "--set=train.steps=2")
        task.check_left_by(name, "--set=train.steps=2")
    assert refused > 0.45 * count


@pytest.mark.parametrize("stage", [0, 2])
def test_kills_of_one_of_two_processes(task, stage):
    """The other one ends too."""
    settings = ("--set=train.steps=2", f"--set=deepspeed.zero_stage={stage}")
    for rank in (0, 1):
        count = events(task, f"count-{stage}-{rank}", *settings, processes=2, rank=rank)
        for at in range(1, count + 1, 1 + count // 6):
            name = f"two-{stage}-{rank}-{at}"
            answer = task.run(name, *settings, processes=2, rank=rank, fault=["kill", name, at])
            assert answer["statuses"][rank] == -signal.SIGKILL and 0 not in answer["statuses"], (at, answer["output"])
            go_on(task, name, *settings, processes=2)
            task.check_left_by(name, *settings, processes=2)


@pytest.mark.parametrize(("processes", "kills"), [(1, 15), (2, 6)])
def test_random_kills(task, processes, kills):
    seconds = task.run(f"timed-{processes}", *LONG, processes=processes)["seconds"]
    for kill in range(kills):
        name = f"random-{processes}-{kill}"
        resume, killed = [], 0
        while True:
            limit = {"kill_after": random.uniform(0.1, 0.9) * seconds} if killed < 2 else {}
            answer = task.run(name, *LONG, *resume, processes=processes, **limit)
            if answer["statuses"] == [0] * processes:
                break
            assert killed < 2 and -signal.SIGKILL in answer["statuses"], answer["output"]
            killed += 1
            resume = ["--resume"] if (task.root / name / "config.toml").exists() else []
        task.check_left_by(name, *LONG, processes=processes)


def test_two_runs_at_once(task, tmp_path):
    """Of two that start together, and of two that resume together, one comes to its end and the other says why not."""
    second = Worker(compile_faults(tmp_path))
    other = Task.__new__(Task)
    other.__dict__.update(vars(task) | {"worker": second})
    try:
        task.worker.run("--help"), second.run("--help")  # both are there before the first race
        for attempt in range(4):
            name, answers = f"at-once-{attempt}", {}
            arguments = LONG
            if attempt > 1:
                answer = task.run(name, *LONG, signal=[signal.SIGKILL, f"{task.root / name}/checkpoints/step-000004"])
                assert answer["statuses"] == [-signal.SIGKILL]
                arguments = (*LONG, "--resume")
            runs = [
                threading.Thread(target=lambda who=who: answers.update({who: who.run(name, *arguments)}))  # noqa: B023
                for who in (task, other)
            ]
            for run in runs:
                run.start()
            for run in runs:
                run.join()
            statuses = sorted(answer["statuses"] for answer in answers.values())
            assert statuses == [[0], [2]], [answer["output"] for answer in answers.values()]
            refused = next(answer for answer in answers.values() if answer["statuses"] == [2])
            assert f"another run is in {task.root / name} (pid " in only_line(refused)
            task.check_left_by(name, *LONG)
    finally:
        second.close()
