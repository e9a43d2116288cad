"""The native row kernels on every instruction set this CPU has: test_rows.py, in a process for each other one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels as kd

NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma", "f16c"}, "portable": set()}


def cpu_flags() -> set[str]:
    """This CPU's; without AVX-512 where torch is told to do without (make test-avx2), the yardstick of these tests."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return flags - NEEDS["avx512"] if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" else flags


@pytest.mark.parametrize("isa", NEEDS)
def test_rows_of_each_instruction_set(isa):
    if not NEEDS[isa] <= cpu_flags():
        pytest.skip(f"this CPU has no {isa}")
    environment = {**os.environ, "KDKERNELS_CPU_ISA": isa}
    code = "import kdkernels as kd; print(kd.info()['cpu_isa'])"
    named = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert named.stdout.strip() == isa
    if isa == kd.info()["cpu_isa"]:
        return  # it is what test_rows.py itself runs on
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native", "test_rows.py"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400


def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, kdkernels as kd; kd.entropy(kd.Head(torch.randn(2, 3), torch.randn(5, 3)))"
    environment = {**os.environ, "KDKERNELS_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "KDKERNELS_CPU_ISA" in done.stderr and "mmx" in done.stderr and "avx512" in done.stderr
