"""The examples beside full logits in fp64: losses within 1e-6, the update of every weight within 1e-4."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from . import runs
from .conftest import EXAMPLES
from .full_logits import check

NAMES = {path.stem for path in EXAMPLES.glob("*.py")} - {"stand_ins"}
ALONE = ("plain", "packed", "peft_lora", "served_teacher")  # nothing in them knows of processes
TOGETHER = ("hf_trainer", "accelerate_loop", "lightning_module", "trl_gkd", "trl_distillation")
SHARDED = ("fsdp2", "deepspeed_zero3", "tensor_parallel")  # nothing to see in one process
NEEDS = {
    "accelerate": ("hf_trainer", "accelerate_loop"),
    "deepspeed": ("deepspeed_zero3",),
    "lightning": ("lightning_module",),
    "peft": ("peft_lora",),
    "trl": ("trl_gkd", "trl_distillation"),
}


def need(name: str) -> None:
    for package, names in NEEDS.items():
        if name in names:
            pytest.importorskip(package, reason=f"examples/{name}.py needs {package}: pip install '.[train,examples]'")


def test_every_example_is_run_and_short():
    assert NAMES == {*ALONE, *TOGETHER, *SHARDED} == runs.RUNS.keys()
    assert max(len((EXAMPLES / f"{name}.py").read_text().splitlines()) for name in NAMES) <= 40


@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_in_one_process(name):
    need(name)
    check(*runs.RUNS[name]())


def test_in_two_processes(tmp_path):
    """One start for all of them: that takes longer than what they compute."""
    names = (*TOGETHER, *SHARDED)
    for name in names:
        need(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = ["-m", runs.__name__, str(tmp_path / "runs"), *names]
    paths = map(str, (EXAMPLES.parent / "tests", EXAMPLES.parent, EXAMPLES))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"runs.{rank}") for rank in (0, 1))
    assert first.keys() == second.keys() == {*names}
    for name, run in first.items():
        print(name)  # what fails is what was printed last
        check(*run)
        for weight, change in run[1].items():
            assert torch.equal(change, second[name][1][weight]), f"{weight} differs between the processes"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TOGETHER]


@pytest.mark.parametrize("name", ["plain", "packed", "peft_lora", *SLOW])  # served_teacher needs a server
def test_as_it_is_started(name, tmp_path, monkeypatch, capsys):
    """The whole file as a program, on what it trains without paths."""
    need(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "loss" in (said := capsys.readouterr().out) or float(said.strip("[]\n").split(",")[-1]) > 0


# Of two processes: half as many steps as of one. Two that know nothing of each other would both take all.
HALF = {
    "hf_trainer": "global_step=9,",
    "accelerate_loop": r"\[[\d.]+(, [\d.]+){5}\]",
    "lightning_module": "6/6",
    "trl_gkd": "global_step=9,",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOGETHER, *SHARDED])
def test_as_it_is_started_by_torchrun(name, tmp_path):
    need(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)  # DeepSpeed compiles its all-reduce for CPUs: a minute
    command.append(str(EXAMPLES / f"{name}.py"))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(HALF.get(name, ""), done.stdout), done.stdout
