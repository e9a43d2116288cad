"""Runs the benchmarks and writes JSON and report: one command, no arguments needed.

    python benchmarks/run.py [--device cpu|cuda] [--shapes SET (cases.py)] [--limit SECONDS] [--out DIR]

Results go to benchmarks/results/<machine>/, those of the dry run (tiny shapes) to build/benchmarks/<machine>/. They are
written anew after every measurement, what is wanted most first: whoever ends a run has a report of all it measured. It
ends by itself when the limit is over (default: 600 s on a GPU, none on a CPU).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # kdkernels, installed or not

import environment  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from cases import SETS  # noqa: E402
from gemms import yardstick  # noqa: E402

LIMIT = {"cuda": 600.0, "cpu": None}
LAST = 0.95  # share of the limit after which what is under way is ended; the rest is for the plots


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=tuple(SETS))
    parser.add_argument("--limit", type=float, help="seconds; no measurement begins after 4/5 of them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch.cuda.is_available() is False. A dry run: --device cpu --shapes tiny")
    limit = options.limit or LIMIT[options.device]
    shapes = options.shapes or usual_shapes(options.device)
    folder = HERE.parent / "build/benchmarks" if shapes == "tiny" else HERE / "results"
    folder = options.out or folder / environment.machine(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shapes}.json"
    path.unlink(missing_ok=True)  # of an earlier run
    arguments = [f"--device={options.device}", f"--shapes={shapes}", f"--results={path.resolve()}", "--benchmark-quiet"]
    arguments += [f"--seconds={limit}"] if limit else []
    # fresh flags: the project's own pytest options and tests do not matter here, nor other plugins
    arguments += ["-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={HERE}"]
    status = within(limit and LAST * limit, [sys.executable, "-m", "pytest", str(HERE), *arguments])
    if status is None:
        print(f"stopped: the limit of {limit:g} seconds is over")
    if not path.exists():
        print("nothing was measured")
        return status or 1
    print(report.write(path))
    return status or 0


def usual_shapes(device: str) -> str:
    if device == "cuda":
        return "gpu"
    return "cpu" if yardstick(torch.bfloat16, device) == torch.bfloat16 else "cpu-avx2"


def within(seconds: float | None, command: list[str]) -> int | None:
    """The command's status, in a process that may crash or be ended; None where it took longer."""
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


if __name__ == "__main__":
    raise SystemExit(main())
