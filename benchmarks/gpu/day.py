"""Everything that a GPU is wanted for, most wanted first, within nine minutes: correctness, speed, peers, counters.

    python benchmarks/gpu/day.py [STEP ...] [--dry] [--limit SECONDS] [--out FOLDER]

Needs torch, triton and nothing else: steps that need more say what, and the others run. Every step has its own limit,
and none stops the rest. report.md is written anew after every finding, so that a run that is ended leaves one of all it
found. Steps that run again replace what they found before. --dry: tiny shapes on this CPU. See docs/gpu-day.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE.parent)]  # kdkernels, installed or not; the benchmarks' modules

import environment  # noqa: E402
import findings  # noqa: E402
import summary  # noqa: E402
import torch  # noqa: E402

LIMIT = 540.0
LEAST = 10.0  # seconds; with fewer left no step begins
SHOWN = 40  # lines of what failed
TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *glob("/opt/nvidia/nsight-compute/*")])
TESTED = ("test_rows.py", "test_properties.py", "test_example.py", "triton_rows.py")  # on the Triton backend alone
TESTS = (*(f"tests/{name}" for name in TESTED), "tests/test_gemm.py::test_tensor_cores_on_a_gpu")
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TESTERS = ("pytest", "hypothesis")
COUNTERS = "SpeedOfLight Occupancy LaunchStats SchedulerStats WarpStateStats MemoryWorkloadAnalysis InstructionStats"
COUNTED = ("_kernel", "Duration", "DRAM Throughput", "Compute (SM)", "Registers Per", "Achieved Occ", "Executed Ipc A")
COUNTED += ("No Eligible", "Executed Instructions")


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, for at most ``limit`` seconds."""

    name: str
    limit: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # modules
    kept: tuple[str, ...] = ()  # lines of the output with one of these are findings
    quoted: bool = False  # has no findings of its own: its last line is one


def steps(python: str = sys.executable, dry: bool = False) -> list[Step]:
    """Most wanted first. In the dry run without tools that only a GPU has."""
    shares = 1 if dry else max(1, min(14, len(os.sched_getaffinity(0)) - 1))

    def own(script: str, *arguments: str) -> list[str]:
        return [python, str(HERE / script), *arguments]

    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", *TESTS]
    pytest += ["--collect-only"] if dry else []
    variants = [python, "-m", "kdkernels.kernels.triton.resources"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--print-limit", "20", "--tool"]
    counters = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "-k", "regex:_kernel"]
    counters += [part for section in COUNTERS.split() for part in ("--section", section)]
    interpreted = {"TRITON_INTERPRET": "1", "KDKERNELS_BACKEND": "triton"} if dry else {}
    tests = {"KDKERNELS_TEST_BACKENDS": "triton", **({"TRITON_INTERPRET": "1"} if dry else {})}
    found = [
        Step("ceilings", 45, [own("ceilings.py")]),
        Step("correctness", 70, [own("correctness.py", f"{i}", f"{shares}") for i in range(shares)], interpreted),
        Step("speed", 150, [own("speed.py", "targets")]),
        Step("kernels", 60, [own("kernels.py")], interpreted),
        Step("peers", 75, [own("speed.py", "peers")]),
        Step("counters", 35, [(counters if not dry else []) + own("kernels.py", "once")], interpreted, kept=COUNTED),
        Step("timeline", 25, [own("timeline.py")]),
        Step("tests", 140, [[*pytest, f"--share={i}/{shares}"] for i in range(shares)], tests, TESTERS, quoted=True),
    ]
    if dry:
        return found
    return [
        *found,
        Step("compile", 45, [[*variants, "compile"]], quoted=True),
        # memcheck sees addresses, and only without PyTorch's caching allocator whose they are
        Step("memcheck", 60, [[*sanitizer, "memcheck", *variants, "launch"]], UNCACHED, quoted=True),
        # racecheck sees shared memory, so it gets the kernels that have some
        Step("racecheck", 35, [[*sanitizer, "racecheck", *variants, "launch", "shared"]], quoted=True),
    ]


class Day:
    """Runs steps and writes down how each ended; ``running`` is what has to end with the day."""

    def __init__(self, folder: Path, limit: float, dry: bool = False):
        self.folder, self.deadline, self.dry = folder, time.monotonic() + limit, dry
        self.running: list[subprocess.Popen] = []
        self.factor = 5 if dry else 1  # limits of a CPU that interprets

    def main(self, chosen: list[Step]) -> int:
        names, problems = [step.name for step in chosen], 0
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.forget(names)
        self.record("plan", "", steps=names)
        for step in chosen:
            began = time.monotonic()
            left = self.deadline - began
            self.record("begun", step.name)
            problem = self.run(step, min(step.limit * self.factor, left)) if left >= LEAST else "no time left"
            problem = problem or self.failures(step)
            took = time.monotonic() - began
            problems += bool(problem)
            self.record("ended", step.name, problem=problem, seconds=took)
            print(f"== {step.name}: {problem or 'ok'} after {took:.0f} s", flush=True)
        return problems > 0

    def record(self, kind: str, step: str, **fields) -> None:
        findings.record(kind, folder=self.folder, step=step, **fields)

    def forget(self, names: list[str]) -> None:
        """What steps that run again found before."""
        kept = [f for f in summary.load(self.folder) if f["step"] not in names]
        others = {"steps": [name for f in kept if f["kind"] == "plan" for name in f["steps"] if name not in names]}
        kept = [f | others if f["kind"] == "plan" else f for f in kept]
        (self.folder / summary.FINDINGS).write_text("".join(f"{json.dumps(f)}\n" for f in kept))

    def run(self, step: Step, seconds: float) -> str:
        """What went wrong, or nothing. The output of each command stays in logs/."""
        absent = [name for name in step.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"not here: {', '.join(absent)}; another Python: make gpu-day PY=python3"
        day = {"GPU_DAY_STEP": step.name, "GPU_DAY_FOLDER": str(self.folder), "GPU_DAY_SECONDS": f"{seconds:g}"}
        day |= {"GPU_DAY_DRY": "1"} if self.dry else {}
        paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | day | step.environment
        started, problem, logs = time.monotonic(), "", []
        self.running = []
        try:
            for number, (tool, *arguments) in enumerate(step.commands):
                path = shutil.which(tool, path=TOOLS)
                if path is None:
                    return f"not here: {tool}"
                logs.append(self.folder / "logs" / f"{step.name}{f'-{number}' if number else ''}.txt")
                with logs[-1].open("wb") as out:
                    options = {"cwd": ROOT, "env": variables, "stdout": out, "stderr": subprocess.STDOUT}
                    # a group of its own: what it starts ends with it
                    process = subprocess.Popen(
                        [path, *arguments], **options, stdin=subprocess.DEVNULL, start_new_session=True
                    )
                self.running.append(process)
            for process in self.running:
                try:
                    process.wait(max(0, started + seconds - time.monotonic()))
                    problem = problem or (f"status {process.returncode}" if process.returncode else "")
                except subprocess.TimeoutExpired:
                    problem = f"not done within its {seconds:.3g} seconds"
        finally:
            self.end()
        for process, log in zip(self.running, logs, strict=True):
            self.show(step, process.returncode, log.read_text(errors="replace").splitlines())
        return problem

    def failures(self, step: Step) -> str:
        found = [f for f in summary.load(self.folder) if f["step"] == step.name]
        return "errors or failed checks" if any(f["kind"] == "error" or f.get("failed") for f in found) else ""

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def show(self, step: Step, status: int, lines: list[str]) -> None:
        """The end of what a command said: on the screen, and in the report where that is all there is."""
        print("\n".join(lines[-SHOWN if status else -1 :]), flush=True)
        kept = [" ".join(line.split()) for line in lines if any(word in line for word in step.kept)]
        if kept:
            self.record("counters", step.name, lines="\n".join(kept[:200]))
        if status or step.quoted:
            self.record("output", step.name, command=step.name, last="\n".join(lines[-8 if status else -1 :]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all, most wanted first")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on this CPU: every step, no figures")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all of it (default: {LIMIT:g})")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<GPU>/day")
    options = parser.parse_args()
    known = {step.name: step for step in steps(dry=options.dry)}
    unknown = [name for name in options.steps if name not in known]
    if unknown:
        parser.error(f"STEP: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch.cuda.is_available() is False. A dry run: --dry")
    folder = options.out or ROOT / "build/gpu-day"
    if not options.out and not options.dry:
        folder = HERE.parent / "results" / environment.machine("cuda") / "day"
    day = Day(folder.resolve(), options.limit, options.dry)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the finally of the step under way ends its commands
    status = day.main([step for name, step in known.items() if name in (options.steps or known)])
    print(summary.write(day.folder).read_text())
    return status


if __name__ == "__main__":
    raise SystemExit(main())
