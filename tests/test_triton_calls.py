"""Whatever the public API launches on a GPU compiles: through Triton's JIT, for a GPU that is not there.

In a process of its own, because this one may interpret. For another Triton than the pinned one: python
tests/triton_calls.py (there).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

KERNELS = {f"{name}_kernel" for name in ("statistics", "candidates", "divergence", "scatter", "gradient")}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.mark.parametrize(
    ("choice", "calls", "least"), [([], 25, 30), pytest.param(["every"], 60, 400, marks=pytest.mark.slow)], ids=str
)
def test_every_call_compiles(tmp_path, choice, calls, least):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("triton_calls.py")), *choice]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads(done.stdout)
    assert report["triton"] == triton.__version__ and report["failed"] == {}
    assert set(report["noted"]) == set(report["compiled"]) == KERNELS
    assert sum(report["compiled"].values()) >= least and report["bytes"] > least * 10_000
    for name, (made, covered, refused) in report["calls"].items():
        assert made >= calls and refused < covered / 4, name


SCALE = """
import torch
from kdkernels.kernels.triton import ahead, scale
with ahead.stand_in(90):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (100, 3 << 30):
            how = {"BLOCK": scale._BLOCK, "num_warps": scale._WARPS, "enable_fp_fusion": False}
            kernel = scale.scale_kernel.warmup(dtype, torch.float32, count, grid=(1,), **how)
            assert len(kernel.asm["cubin"]) > 1000
            print(dtype, count)
"""


def test_the_kernel_of_the_backward_compiles(tmp_path):
    """Of gradients on a GPU alone, which no call above has; with more than 2^31 numbers too."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCALE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 6


def test_launches_past_the_jit_are_those_of_the_jit():
    """Its own lookup finds the same compiled kernel for hundreds of arguments and options; whoever listens is heard."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("triton_launches.py"))]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["triton"] == triton.__version__ and set(report["kernels"]) == {*KERNELS, "scale_kernel"}
    for name, found in report["kernels"].items():
        assert found["wrong"] == 0 and found["direct"] == 300 and found["kernels"] > 150, (name, found)
        assert found["globals"] == 0, name  # the JIT compares those at every launch, which is left out
        assert len(found["heard"]) == 7 and all(found["heard"].values()), (name, found["heard"])


def test_steps_of_other_lengths_compile_nothing(tmp_path):
    """After a step in one chunk and one in several: sizes that change from step to step are no part of a kernel."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("triton_ragged.py"))]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report) == 8 and all(count >= 4 for count, _ in report.values())
    assert {name: later for name, (_, later) in report.items() if later} == {}
