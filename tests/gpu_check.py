"""make gpu-check: the row kernels' tests and compute-sanitizer on this machine's GPU, within five minutes.

    python tests/gpu_check.py

What takes the time is compiling some 1200 kernels at half a second each, so many processes do it side by side: the
tests are dealt out to as many as there are CPUs, in random order, so that few meet the same kernel at once; what the
sanitizer is to see is compiled before. memcheck sees addresses, and only without PyTorch's caching allocator whose they
are; racecheck sees shared memory, so it gets the kernels that have some. Needs neither the C++ extension nor anything
beside torch, triton, pytest, hypothesis and the CUDA toolkit's compute-sanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("test_rows.py", "test_properties.py", "test_example.py", "triton_rows.py")  # on the Triton backend alone
TESTS = (*(f"tests/{name}" for name in FILES), "tests/test_gemm.py::test_tensor_cores_on_a_gpu")
SHOWN = 60  # lines of what failed


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, for at most ``limit`` seconds."""

    name: str
    limit: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


def steps(python: str = sys.executable) -> list[Step]:
    shares = max(1, min(14, len(os.sched_getaffinity(0)) - 1))
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", *TESTS]
    triton = {"KDKERNELS_TEST_BACKENDS": "triton"}
    variants = [python, "-m", "kdkernels.rows.triton_resources"]
    tools = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    sanitizer = [shutil.which("compute-sanitizer", path=tools) or "compute-sanitizer"]
    sanitizer += ["--error-exitcode", "1", "--print-limit", "20", "--tool"]
    return [
        Step("tests", 140, [[*pytest, f"--share={i}/{shares}"] for i in range(shares)], triton),
        Step("compile", 45, [[*variants, "compile"]]),
        Step(
            "memcheck", 60, [[*sanitizer, "memcheck", *variants, "launch"]], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ),
        Step("racecheck", 35, [[*sanitizer, "racecheck", *variants, "launch", "shared"]]),
    ]  # fmt: skip


def run(step: Step) -> str:
    """What went wrong, or nothing. Prints the end of what each failed command said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started, problem, processes = time.monotonic(), "", []
    with tempfile.TemporaryDirectory() as folder:
        for number, command in enumerate(step.commands):
            path = Path(folder, str(number))
            with path.open("wb") as out:
                try:
                    process = subprocess.Popen(
                        command, cwd=ROOT, env=environment | step.environment, stdout=out, stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL, start_new_session=True,
                    )  # fmt: skip
                except FileNotFoundError:
                    return f"{command[0]} is not on this machine's PATH"
            processes.append((process, path))
        for process, path in processes:
            try:
                process.wait(max(0, started + step.limit - time.monotonic()))
                if process.returncode:
                    problem = problem or f"status {process.returncode}"
            except subprocess.TimeoutExpired:
                problem = f"not done within its {step.limit:g} seconds"
                os.killpg(process.pid, signal.SIGKILL)  # what it started as well
                process.wait()
            lines = path.read_text(errors="replace").splitlines()
            print("\n".join(lines[-SHOWN if process.returncode else -1 :]), flush=True)
    return problem


def main(chosen: list[Step]) -> int:
    problems = {}
    for step in chosen:
        started = time.monotonic()
        problem = run(step)
        problems |= {step.name: problem} if problem else {}
        print(f"== {step.name}: {problem or 'ok'} after {time.monotonic() - started:.0f} s", flush=True)
    return bool(problems)


def missing() -> str:
    """What this needs and does not find."""
    absent = [name for name in ("torch", "triton", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        return f"make gpu-check: {sys.executable} lacks {', '.join(absent)}; another Python: make gpu-check PY=python3"
    import torch

    return "" if torch.cuda.is_available() else "make gpu-check: no GPU here, torch.cuda.is_available() is False"


if __name__ == "__main__":
    raise SystemExit(missing() or main(steps()))
