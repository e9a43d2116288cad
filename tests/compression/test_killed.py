"""Stages with a compression that are killed, and on two processes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.training.conftest import final_weights

from .conftest import lines, trained_teachers, write

MORE = ("--set=train.steps=3", "--set=checkpoint.every=1", "--set=run.seed=7")
NAMES = ("full", "short", "label")


def command(path, *launcher):
    return [sys.executable, "-m", *launcher, "kdkernels", "train", str(path), *MORE]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A root whose stages all came to their end undisturbed, their teachers two models of this machine."""
    root = tmp_path_factory.mktemp("whole") / "task"
    root.mkdir()
    path = trained_teachers(write(root))
    subprocess.run(command(path), env=environment(), check=True, capture_output=True)
    return root


def same(root, whole):
    place = "run/compressions/short/"
    assert lines(root / place / "decisions.jsonl") == lines(whole / place / "decisions.jsonl")
    assert (root / place / "train.jsonl").read_bytes() == (whole / place / "train.jsonl").read_bytes()
    for name in NAMES:
        got, right = final_weights(root / "run" / name), final_weights(whole / "run" / name)
        assert all(torch.equal(got[key], weight) for key, weight in right.items()), name


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(whole, tmp_path):
    """kill -9 as soon as something new lies in the directory: in every stage, in the answers and in the rewriting."""
    root = tmp_path / "task"
    root.mkdir()
    path, rng, seen, killed = trained_teachers(write(root)), random.Random(0), set(), []
    for _ in range(20):
        process = subprocess.Popen(command(path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and len(killed) < 10:
            there = {file.relative_to(root) for file in (root / "run").rglob("*") if "unfinished" not in str(file)}
            if any(part in str(file) for file in there - seen for part in ("step-", "answers/", "rewritings", "final")):
                seen |= there
                time.sleep(rng.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                killed.append(there)
            time.sleep(0.005)
        output, _ = process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0, output.decode()
    assert len(killed) >= 5
    same(root, whole)


@pytest.mark.slow
def test_two_processes_make_the_same_data(whole, tmp_path):
    """The compression of what both have trained: with the same student, the same answers and rewritings."""
    root = tmp_path / "task"
    root.mkdir()
    path = trained_teachers(write(root))
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "-m")
    subprocess.run(command(path, *launcher), env=environment(), check=True, capture_output=True)
    made, right = (
        lines(root / "run/compressions/short/train.jsonl"),
        lines(whole / "run/compressions/short/train.jsonl"),
    )
    assert len(made) == len(right) == 32
    assert len(list((root / "run/compressions/short/answers").iterdir())) == 4
    assert [one["line"] for one in lines(root / "run/compressions/short/decisions.jsonl")] == list(range(1, 33))
    for name in NAMES:
        got, weights = final_weights(root / "run" / name), final_weights(whole / "run" / name)
        assert all((got[key] - weight).abs().max() < 1e-3 for key, weight in weights.items()), name
    assert (root / "run" / "stages.md").is_file()
