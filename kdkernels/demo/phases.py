"""What the demo trains, and the processes that do it.

Every training is `kdkernels train` on a recipe of recipes/demo in a process of its own, so that its seconds and its
peak memory are its own. Those that do not depend on each other run side by side, one per core.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdkernels.training.recipe.schema import read_toml

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
ROOT, SEED = "runs/demo/", "seed-0/"  # the demo's directory and the seed's in it, as the recipes spell them
MEASURE = Path(__file__).with_name("measure.py")
PROBLEMS = {"teacher": 19200, "few": 600, "many": 1200, "new": 9600, "test": 1000}  # in each data file


@dataclass(frozen=True)
class Phase:
    """One training. `name` is its directory, `recipe` a file of recipes/demo, `overrides` go to --set.

    `title` describes it in the report, `solutions` is the data file whose worked solutions it learns from.
    """

    name: str
    title: str
    recipe: str
    solutions: str | None
    overrides: tuple[str, ...] = ()


_MANY = ("data.train=runs/demo/data/many.jsonl",)
_FROM_STRONG = ("student.path=runs/demo/seed-0/strong-student/final", "optimizer.lr=2e-4")

TEACHER = Phase("teacher", "teacher", "teacher", "teacher")
STUDENTS = (
    Phase("student", "starting student", "student", "few"),
    Phase("strong-student", "strong starting student", "student", "many", (*_MANY, "train.steps=500")),
)
PAPER, SCALED = "the paper's weights (0.1 / 1 / 1, k = 10)", "scaled weights (0.003 / 1 / 0.001, k = 2)"
FROM_STUDENT = (
    Phase("sft", "continued SFT", "sft", "few"),
    Phase("gkd", "GKD", "gkd", None),
    Phase("tsd-kd-scaled", f"TSD-KD, {SCALED}", "tsd-kd-scaled", None),
    Phase("tsd-kd", f"TSD-KD, {PAPER}", "tsd-kd", None),
    Phase("sft-new", "SFT on new solutions", "sft", "new", ("data.train=runs/demo/data/new.jsonl",)),
)
FROM_STRONG_STUDENT = (
    Phase("strong-sft", "strong, continued SFT", "sft", "many", (*_FROM_STRONG, *_MANY)),
    Phase("strong-gkd", "strong, GKD", "gkd", None, _FROM_STRONG),
    Phase("strong-tsd-kd", f"strong, TSD-KD, {PAPER}", "tsd-kd", None, _FROM_STRONG),
)
PHASES = (TEACHER, STUDENTS[0], *FROM_STUDENT, STUDENTS[1], *FROM_STRONG_STUDENT)  # as they stand in the report


def directory(phase: Phase, output: Path, seed: int) -> Path:
    """Where the phase's run is. All seeds share the teacher."""
    return output / phase.name if phase is TEACHER else output / f"seed-{seed}" / phase.name


def settings(phase: Phase, output: Path, seed: int) -> list[str]:
    """The phase's --set assignments: its own, the seed, and every path of its recipe, moved to `output` and `seed`."""
    tables = read_toml(RECIPES / f"{phase.recipe}.toml")
    values = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    values |= dict(assignment.split("=", 1) for assignment in phase.overrides)
    values["run.output"] = f"{ROOT}{directory(phase, Path(), 0)}"
    paths = {key: value for key, value in values.items() if isinstance(value, str) and value.startswith(ROOT)}
    moved = {
        key: path.replace(ROOT, f"{output.as_posix()}/", 1).replace(SEED, f"seed-{seed}/", 1)
        for key, path in paths.items()
    }
    own = [assignment for assignment in phase.overrides if assignment.split("=", 1)[0] not in paths]
    return [*own, f"run.seed={seed}", *(f"{key}={json.dumps(path)}" for key, path in moved.items())]


@dataclass(frozen=True)
class Cost:
    """Seconds and peak resident memory (MiB) of a process."""

    seconds: float
    peak: float


class Workers:
    """Runs commands side by side, one per core, their output prefixed with a name; logs go to `logs`."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.cores = len(os.sched_getaffinity(0))
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.starting = threading.Lock()
        logs.mkdir(parents=True)

    def run(self, commands: dict[str, Sequence[str]]) -> dict[str, Cost]:
        """Runs all, at most one per core, which then share the cores. Returns what each cost.

        Raises RuntimeError if one fails; the others are stopped then, and whenever the wait is interrupted.
        """
        at_once = min(self.cores, len(commands))
        with ThreadPoolExecutor(at_once) as pool:
            futures = {
                name: pool.submit(self._run, name, command, self.cores // at_once) for name, command in commands.items()
            }
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
                return {name: future.result() for name, future in futures.items() if future.done()}
            except BaseException:
                self._stop()
                raise

    def _stop(self) -> None:
        """Ends what runs and lets nothing else start."""
        with self.starting:
            self.stopped = True
            for process in list(self.running):
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGTERM)

    def _run(self, name: str, command: Sequence[str], threads: int) -> Cost:
        base = self.logs / name.replace("/", "-")
        log_path, cost_path = base.with_suffix(".log"), base.with_suffix(".json")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with self.starting:
            if self.stopped:
                raise RuntimeError(f"{name}: not started, because another one failed")
            process = subprocess.Popen(
                [sys.executable, "-S", MEASURE, cost_path, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own, to be stopped as one
            )
            self.running.add(process)
        with process, log_path.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                print(f"{name:>22} | {line}", end="", flush=True)
            process.wait()
            self.running.discard(process)
        if process.returncode:
            raise RuntimeError(f"{name}: exit status {process.returncode}; its output is in {log_path}")
        return Cost(**json.loads(cost_path.read_text(encoding="utf-8")))


def train_commands(phases: Sequence[Phase], output: Path, seeds: Sequence[int], overrides: Sequence[str]):
    """{run directory below `output`: command} of `phases` for each seed; `overrides` come last."""
    commands = {}
    for phase in phases:
        for seed in seeds:
            assignments = [*settings(phase, output, seed), *overrides]
            options = [word for assignment in assignments for word in ("--set", assignment)]
            recipe = str(RECIPES / f"{phase.recipe}.toml")
            name = directory(phase, Path(), seed).as_posix()
            commands[name] = [sys.executable, "-m", "kdkernels", "train", recipe, *options]
    return commands
