"""Two processes of one run, of which one cannot go on: the other one ends too, and both say why."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdkernels.training import InputError, train
from kdkernels.training.cli import main
from kdkernels.training.processes import distributed

from .conftest import GKD, final_weights
from .test_processes import COMMAND, IN_PARTS, untimed

ENDLESS = ("--set=train.steps=1000000", "--set=checkpoint.every=0")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def pair(recipe, tmp_path):
    """pair(common, second, command): two processes of a run, as a launcher starts them; `second` are further arguments
    of the second one. Their output is in 0.txt and 1.txt.
    """
    processes = []

    def pair(common=(), second=(), command=COMMAND):
        port = free_port()
        for rank in range(2):
            launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(Path(__file__).parents[2])}
            arguments = ["--set=train.micro_batch_size=1", *common, *(second if rank else ())]
            with (tmp_path / f"{rank}.txt").open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [*command, str(recipe), *arguments],
                        cwd=tmp_path,
                        env=os.environ | launcher,
                        stdout=subprocess.DEVNULL,
                        stderr=output,
                    )
                )
        return processes[-2:]

    yield pair
    for process in processes:
        process.kill()
        process.wait()


def last_line(tmp_path, rank):
    return (tmp_path / f"{rank}.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("where", ["recipe", pytest.param("data", marks=pytest.mark.slow)])
def test_input_that_one_process_cannot_use_ends_both(pair, tmp_path, where):
    (tmp_path / "broken.jsonl").write_text("no JSON\n")
    path = tmp_path / ("nowhere.jsonl" if where == "recipe" else "broken.jsonl")
    processes = pair(second=[f"--set=data.train={path}"])
    assert [process.wait(timeout=200) for process in processes] == [2, 2]  # long before the timeout of half an hour
    said = {"recipe": f"[data] train: no such file: {path}", "data": f"{path}, line 1: expected a JSON object"}[where]
    first, second = (last_line(tmp_path, rank) for rank in range(2))
    assert first.startswith("kdkernels: process 1: ") and said in first
    assert second.startswith("kdkernels: ") and said in second and "process 1" not in second
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sign", "seconds"), [(signal.SIGSTOP, 12), pytest.param(signal.SIGKILL, 1800, marks=pytest.mark.slow)]
)
def test_a_process_that_no_longer_answers_ends_the_other(pair, tmp_path, sign, seconds):
    processes = pair([*ENDLESS, f"--set=run.timeout_seconds={seconds}"])
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert processes[0].poll() is None and time.monotonic() < deadline, (tmp_path / "0.txt").read_text()
        time.sleep(0.1)
    processes[1].send_signal(sign)
    assert processes[0].wait(timeout=200) == 4
    line = last_line(tmp_path, 0)
    assert line.startswith("kdkernels: another process of the run ended, or did not answer in time ([run] timeout_sec")
    assert (f"Timed out waiting {seconds}000ms" in line) == (sign == signal.SIGSTOP)
    assert not (tmp_path / "run" / "final").exists()


# An odd number of entries in every norm, and responses of several lengths: the shares of two processes are never alike.
ODD = (
    'student.architecture={model_type="llama", hidden_size=15, head_dim=8, num_hidden_layers=2, num_attention_heads=3, '
    "num_key_value_heads=1, intermediate_size=33, initializer_range=0.3}"
)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["TSDKD", "VCRD"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_in_parts_that_lost_a_process_resumes_bit_for_bit(pair, teacher_set, tmp_path, objective, dtype):
    """Weights, gradients and optimizer in parts (ZeRO-3), rollouts, evaluation by answers and by tokens."""
    options = {"TSDKD": "objective.k=4", "VCRD": "objective.weighting=likelihood_ratio"}
    settings = [
        *GKD[:1], f"objective.name={objective}", options[objective], ODD, teacher_set, f"run.dtype={dtype}",
        "deepspeed.zero_stage=3", "train.steps=30", "checkpoint.every=2", "rollout.student_fraction=0.5",
        f"evaluation.data={tmp_path / 'test.jsonl'}", "evaluation.every=7", "evaluation.batch_size=3",
        'evaluation.metrics=["exact_match", "kl"]', "evaluation.answer='(\\d+)'",
    ]  # fmt: skip
    settings = [f"--set={text}" for text in settings]
    whole = pair([*settings, f"--set=run.output={tmp_path / 'whole'}"], command=IN_PARTS)
    assert [one.wait(timeout=400) for one in whole] == [0, 0], (tmp_path / "0.txt").read_text()

    run = tmp_path / "run"
    processes, deadline = pair(settings, command=IN_PARTS), time.monotonic() + 400
    while not (run / "checkpoints" / "step-000006").exists():
        assert processes[0].poll() is None and time.monotonic() < deadline, (tmp_path / "0.txt").read_text()
        time.sleep(0.01)
    processes[1].kill()
    assert processes[0].wait(timeout=200) == 4, (tmp_path / "0.txt").read_text()
    assert not (run / "final").exists()
    again = pair([*settings, "--resume"], command=IN_PARTS)
    assert [one.wait(timeout=400) for one in again] == [0, 0], (tmp_path / "0.txt").read_text()

    assert untimed(run) == untimed(tmp_path / "whole") and len(untimed(run)) == 31
    lengths = {line.get("student_length") for line in untimed(run)}
    assert len(lengths) > 5
    resumed, expected = final_weights(run), final_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    assert {weight.dtype for weight in expected.values()} == {getattr(torch, dtype)}


@pytest.mark.slow
def test_a_student_that_collapses_ends_both(pair, teacher_set, tmp_path):
    limits = ("collapse.min_entropy=50", "collapse.steps=3", "rollout.samples=4")
    processes = pair([f"--set={text}" for text in (*GKD, teacher_set, *limits)])
    assert [one.wait(timeout=200) for one in processes] == [5, 5]
    for rank in range(2):
        assert "kdkernels: step 3: student_entropy is" in (tmp_path / f"{rank}.txt").read_text()
    kept = (tmp_path / "run" / "rollouts-000001.jsonl").read_text().splitlines()
    assert len({json.loads(line)["line"] for line in kept}) == 4  # of both, in one file
    assert len(untimed(tmp_path / "run")) == 3


def test_half_a_launcher_is_refused(monkeypatch, recipe, capsys):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    for name in distributed.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert "RANK is set" in printed and "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not" in printed


def test_where_one_fails_all_fail(monkeypatch):
    """What `together` does on a process that succeeded, and on one that did not, when process 1 of 3 fails."""
    distributed.start()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for error, kind in ((OSError(2, "No such file", "x"), InputError), (KeyError("k"), RuntimeError)):
        sent = distributed._for_others(error)
        assert type(sent) is kind and "process 1" in str(sent) and str(error) in str(sent)
        monkeypatch.setattr(distributed, "gathered", lambda own, sent=sent: [None, sent, own])
        with pytest.raises(kind, match="process 1"), distributed.together():
            pass
        with pytest.raises(type(error)), distributed.together():
            raise error
    monkeypatch.setattr(distributed, "gathered", lambda own: [None, None, own])
    with distributed.together():
        pass


def test_every_group_of_processes_has_the_timeout(load, monkeypatch):
    limited = {}
    monkeypatch.setattr(
        distributed.distributed_c10d,
        "_set_pg_timeout",
        lambda timeout, group: limited.update({group: timeout.total_seconds()}),
    )
    train(load("run.timeout_seconds=77", "train.steps=1"))
    groups = set(distributed.distributed_c10d._world.pg_map)
    assert len(groups) > 1 and limited == dict.fromkeys(groups, 77)  # the default one and DeepSpeed's


def test_a_process_leaves_its_group_before_it_ends(tmp_path):
    """Python's own exit leaves gloo's threads running, which now and then abort a process that has finished its run."""
    program = """
import sys
import torch.distributed as dist
from kdkernels import cli
from kdkernels.training.processes import distributed
distributed.start()
assert dist.is_initialized()
assert cli.main(["train", "missing.toml"]) == 2
sys.exit(f"still in {dist.group.WORLD}" if dist.is_initialized() else 0)
"""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher |= {"MASTER_PORT": free_port(), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | launcher, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("started", [True, False], ids=["by a launcher", "alone"])
def test_threads_have_dropped_all_tensors_before_python_ends(tmp_path, started):
    """A thread of gloo's that drops a tensor while the interpreter ends aborts the process. Here it always would: the
    operation takes longer than its start, and from then on the main thread keeps Python's lock.
    """
    program = """
import atexit, os, sys, time, weakref
import torch
import torch.distributed as dist
from kdkernels.training.processes import distributed

held = []
atexit.register(lambda: os.write(1, repr(held).encode()))  # atexit: the last one registered comes first
atexit.register(lambda: held.append(tensor() is not None))
distributed.start()
whole, parts = torch.ones(1 << 24), [torch.empty(1 << 24)]
tensor = weakref.ref(whole)
sys.setswitchinterval(100)
dist.all_gather(parts, whole, async_op=True)
del whole
until = time.monotonic() + 0.5
while time.monotonic() < until:
    pass
held.append(tensor() is not None)
"""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher = launcher | {"MASTER_PORT": free_port()} if started else {}
    package = {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment = os.environ | launcher | package | {"CUDA_VISIBLE_DEVICES": ""}  # gloo's groups are those of CPUs
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "[True, False]"), done.stderr
