"""What a run keeps of the student's rollouts."""

import json
import re

import pytest

from kdkernels.training import InputError, train
from kdkernels.training.processes import distributed
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import read_metrics
from kdkernels.training.run.samples import Samples

from .conftest import GKD


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(run):
    return sorted(path.name for path in run.glob("rollouts-*"))


def test_rollouts_are_kept_as_the_student_wrote_them(load, teacher_set, tmp_path):
    config = load(*GKD, teacher_set, "train.steps=7", "rollout.samples=4", "rollout.samples_every=3")
    run = train(config).output
    assert names(run) == ["rollouts-000001.jsonl", "rollouts-000003.jsonl", "rollouts-000006.jsonl"]
    task = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
    for step in (1, 3, 6):
        kept = lines(run / f"rollouts-{step:06d}.jsonl")
        assert len(kept) == 4  # the whole batch, so that the log says the same of it
        assert sum(one["tokens"] for one in kept) == logged[step]["tokens"]
        assert sum(one["finished"] for one in kept) == 4 * logged[step]["student_finished"]
        for one in kept:
            assert one["prompt"] == task[one["line"] - 1]["question"]
            tokens = re.findall(r"<\w+>|.", one["response"], re.DOTALL)  # characters, or special ones, which are seen
            assert len(tokens) == one["tokens"] - one["finished"]


def test_of_the_steps_that_the_student_writes(load, teacher_set):
    half = ("rollout.student_fraction=0.5", "rollout.samples=2", "rollout.samples_every=2", "train.steps=8")
    run = train(load(*GKD, teacher_set, *half)).output
    assert names(run) == [f"rollouts-{step:06d}.jsonl" for step in (2, 4, 8)]
    assert all(len(lines(path)) == 2 for path in run.glob("rollouts-*"))


def test_a_resumed_run_keeps_the_same(load, teacher_set, tmp_path):
    settings = (*GKD, teacher_set, "train.steps=6", "rollout.samples_every=2", "checkpoint.every=3")
    whole = train(load(*settings)).output
    kept = {name: (whole / name).read_text() for name in names(whole)}
    assert len(kept) == 4
    for name in names(whole)[2:]:
        (whole / name).write_text("of a run that was killed\n")
    for path in (whole / "final", whole / "checkpoints" / "step-000006"):
        path.rename(tmp_path / path.name)
    assert train(load(*settings), resume=True).output == whole
    assert {name: (whole / name).read_text() for name in names(whole)} == kept


def test_none_at_all(load, teacher_set):
    assert names(train(load(*GKD, teacher_set, "rollout.samples=0")).output) == []
    assert names(train(load("run.output=" + load().run.output + "-sft")).output) == []


def test_the_head_of_the_batch_whoever_wrote_it(load, teacher_set, tmp_path, monkeypatch):
    """The processes' shares in the order of the batch: process r has every second example, from the r-th on."""

    class Characters:
        def decode(self, ids, **_):
            return "".join(map(str, ids))

    class Example:
        def __init__(self, line):
            self.line, self.prompt = line, f"prompt {line}"

    def gathered(own):
        return [own, [one | {"line": one["line"] + 1} for one in own]]

    monkeypatch.setattr(distributed, "gathered", gathered)
    monkeypatch.setattr(distributed, "by_first", lambda function: function())
    config = load(*GKD, teacher_set, "rollout.samples=3")
    samples = Samples(config, RunDirectory(tmp_path), Characters(), ends=(9,))
    samples.keep(5, 1, [Example(1), Example(3)], [[1, 2, 9], [9]])
    kept = lines(tmp_path / "rollouts-000005.jsonl")
    assert [one["line"] for one in kept] == [1, 2, 3]
    assert kept[0] == {"line": 1, "prompt": "prompt 1", "response": "12", "tokens": 3, "finished": True}
    assert kept[2]["response"] == "" and kept[2]["tokens"] == 1


def test_limits(load, teacher_set):
    assert load(*GKD, teacher_set).rollout.samples == 4
    assert load(*GKD, teacher_set, "train.batch_size=2").rollout.samples == 2
    assert load(*GKD, teacher_set, "train.steps=70").rollout.samples_every == 7
    assert load().rollout.samples is None
    with pytest.raises(InputError, match=r"\[rollout\] samples: expected at most train.batch_size = 4, got 5"):
        load(*GKD, teacher_set, "rollout.samples=5")
    with pytest.raises(InputError, match=r"\[rollout\] samples_every is of what the student writes"):
        load("rollout.samples_every=5")
