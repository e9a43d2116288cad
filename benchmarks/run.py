"""Runs the benchmarks and writes JSON and report: one command, no arguments needed.

    python benchmarks/run.py [--device cpu|cuda] [--shapes tiny|readme|cpu|cpu-fp32|gpu] [--out DIRECTORY]

Results go to benchmarks/results/<machine>/, those of the dry run (tiny shapes) to build/benchmarks/<machine>/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # kdkernels, installed or not

import environment  # noqa: E402
import pytest  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=("tiny", "readme", "cpu", "cpu-fp32", "gpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch.cuda.is_available() is False. A dry run: --device cpu --shapes tiny")
    shapes = options.shapes or {"cpu": "cpu", "cuda": "gpu"}[options.device]
    folder = HERE.parent / "build/benchmarks" if shapes == "tiny" else HERE / "results"
    folder = options.out or folder / environment.machine(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shapes}.json"
    arguments = [f"--device={options.device}", f"--shapes={shapes}", f"--benchmark-json={path}", "--benchmark-quiet"]
    # fresh flags: the project's own pytest options and tests do not matter here, nor other plugins
    status = pytest.main([str(HERE), *arguments, "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={HERE}"])
    if path.exists():
        print(report.write(path))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
