"""Regression gate: measures kdkernels anew and compares with what is stored for this class of machines.

    python benchmarks/compare.py [--store]

1 if kdkernels got slower. ``--store`` stores what it takes now, which is what later runs are compared with.

A figure of a process is the median, over its rounds, of kdkernels' seconds divided by those that the bare GEMMs took
just before: what slows a shared machine slows both. What is off for the life of a process (where its memory lies) is
not seen by that. So medians of several processes are compared, and as long as something seems slower there is one more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import environment
from report import cells, load, replace, table

HERE = Path(__file__).parent
OUT = HERE.parent / "build/benchmarks/compare"
ALLOWED = 1.05  # times the stored figure
PROCESSES = 5

Rounds = dict[str, list[list[float]]]  # by what was measured: seconds of kdkernels and of the bare GEMMs of each round


def measure() -> Rounds:
    """What one process takes."""
    command = [sys.executable, str(HERE / "run.py"), "--device=cpu", "--shapes=compare", f"--out={OUT}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {
        f"{c['implementation']}, {c['loss']}, {c['case']}": c["rounds_s"] for c in cells(load(OUT / "compare.json"))
    }


def figure(rounds: list[list[float]]) -> float:
    return median(ours / bare for ours, bare in rounds)


def compare(stored: list[Rounds], measured: Callable[[], Rounds]) -> tuple[str, bool]:
    """A table, and whether nothing stored got slower."""
    baseline = {name: median(figure(rounds[name]) for rounds in stored) for name in stored[0]}
    figures: dict[str, list[float]] = {name: [] for name in baseline}
    for _ in range(PROCESSES):
        rounds = measured()
        for name, of_processes in figures.items():
            of_processes.append(figure(rounds[name]) if name in rounds else float("inf"))
        found = {name: median(of_processes) for name, of_processes in figures.items()}
        slower = [name for name in baseline if found[name] > ALLOWED * baseline[name]]
        if not slower:
            break
    rows = [
        [name, f"{before:.3f}", f"{found[name]:.3f}", "**slower**" if name in slower else ""]
        for name, before in baseline.items()
    ]
    return table(["x bare GEMMs", "stored", "now", ""], rows), not slower


def main() -> int:
    if sys.argv[1:] not in ([], ["--store"]):
        raise SystemExit(__doc__)
    machine = environment.describe("cpu")
    path = HERE / "results" / machine["machine"] / "compare.json"
    if sys.argv[1:]:
        stored = {"machine": machine, "processes": [measure() for _ in range(PROCESSES)]}
        path.parent.mkdir(exist_ok=True)
        replace(path, json.dumps(stored))
        return 0
    if not path.exists():
        raise SystemExit(f"nothing is stored for {machine['machine']} yet: make bench-store does")
    stored = load(path)
    if stored["machine"]["cpu"] != machine["cpu"]:
        print(f"stored on another CPU ({stored['machine']['cpu']}): its ratios to torch's products may differ")
    shown, good = compare(stored["processes"], measure)
    print(shown)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
