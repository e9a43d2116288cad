"""Heads of FSDP2, ZeRO-3 and tensor parallelism: the numbers of full logits in fp64, or an error with a way out."""

import re
import sys
from pathlib import Path

import pytest
import torch

from .sharded import CASES, REFUSED, Error
from .test_processes import finish, start

PROGRAM = str(Path(__file__).with_name("sharded.py"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes compared, and what it was refused."""
    root = tmp_path_factory.mktemp("sharded")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM)
    finish(start(command, str(root / "found"), cwd=root), root)
    return [torch.load(root / f"found.{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(found, name):
    for compared, _ in found:
        errors = {parameter: Error(*each) for parameter, each in compared[name].items()}
        assert errors["loss"].ours < (3e-3 if CASES[name].in_bf16 else 1e-6)
        for parameter, error in errors.items():
            assert error.size > 1e-3, f"{parameter}: a gradient that says nothing"
            assert error.ours < (1.5 * error.eager if CASES[name].in_bf16 else 1e-5), parameter


TOLD = {
    "bare": "TypeError: weight: .*DTensor, of which this process holds a shard; pass kd.Head.from_model.*kd.through",
    "bare bias": "TypeError: bias: .*DTensor, of which this process holds a shard; pass kd.Head.from_model.*kd.through",
    "hidden": r"TypeError: hidden: .*DTensor, of which this process holds a shard; pass hidden\.full_tensor",
    "full tensor": r"TypeError: weight: .*kd.Head.from_model.*weight\.full_tensor\(grad_placements=.*Partial",
    "full tensor, cast": r"TypeError: weight: .*kd.Head.from_model.*weight\.full_tensor\(grad_placements=.*Partial",
    "full bias": r"TypeError: bias: .*kd.Head.from_model.*bias\.full_tensor\(grad_placements=.*Partial",
    "unknown": "TypeError: weight: got shards .*LlamaForCausalLM has no FSDP2 unit of it.*kd.through",
    "frozen trunk": "RuntimeError: weight: no gradient would reach it: hidden requires none.*kd.through",
    "shard alone": r"TypeError: weight: got the shard of this process alone; .*kd.Head.from_model.*group=",
    "columns": r"TypeError: weight: got shards .*Shard\(dim=1\).* no .*plan that divides the rows.*kd.Logits",
    "no row": "TypeError: weight: expected rows on each of 2 processes, got 1 in all",
    "FSDP2 and plan": "TypeError: weight: got shards .*of both FSDP2 and tensor parallelism.*kd.through",
    "ZeRO-3 outside": r"TypeError: weight: expected shape \[V, H\], got \[0\]; ZeRO-3 holds its rows.*kd.through",
    "ZeRO-3 outlived": "RuntimeError: weight: it had its values when the head was made, and has none now.*kd.through",
    "FSDP2 outlived": "RuntimeError: weight: it had its values when the head was made, and has none now.*kd.through",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(found, name):
    for _, refused in found:
        assert re.match(TOLD[name], refused[name]), refused[name]
