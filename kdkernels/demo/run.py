"""The demo from beginning to end: problems, teacher, students, arms, report."""

import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from kdkernels.demo.arithmetic import generate, write_jsonl
from kdkernels.demo.phases import (
    FROM_STRONG_STUDENT,
    FROM_STUDENT,
    PHASES,
    PROBLEMS,
    RECIPES,
    STUDENTS,
    TEACHER,
    Workers,
    train_commands,
)
from kdkernels.demo.plots import plot_accuracy, plot_curves
from kdkernels.demo.report import render
from kdkernels.demo.results import load_arm

MARKER = ".kdkernels-demo"


def run_demo(output: Path, seeds: int = 1, overrides: Sequence[str] = ()) -> Path:
    """Runs everything below `output` and returns the path of the report. `overrides` (section.key=value) go to every
    training.

    A demo that is already there is deleted first. Raises FileExistsError where `output` holds anything else,
    FileNotFoundError without the recipes, RuntimeError for a training that fails.
    """
    started = time.monotonic()
    if not RECIPES.is_dir():
        raise FileNotFoundError(f"no recipes in {RECIPES}: run the demo from a clone of the repository")
    start_afresh(output)
    write_problems(output / "data")
    workers, numbers = Workers(output / "logs"), range(seeds)
    costs = workers.run(train_commands([TEACHER], output, [0], overrides))
    costs |= workers.run(train_commands(STUDENTS, output, numbers, overrides))
    longest_first = sorted((*FROM_STUDENT, *FROM_STRONG_STUDENT), key=lambda phase: phase.recipe == "sft")
    costs |= workers.run(train_commands(longest_first, output, numbers, overrides))

    _say("evaluating the differences between arms")
    results = [load_arm(phase, output, numbers, costs) for phase in PHASES]
    plot_accuracy(results, output / "accuracy.png")
    plot_curves(results, output / "curves.png")
    report = output / "report.md"
    report.write_text(render(results, time.monotonic() - started, workers.cores), encoding="utf-8")
    return report


def start_afresh(output: Path) -> None:
    """Makes `output` an empty directory marked as the demo's; deletes an earlier demo in it, and nothing else."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            raise FileExistsError(f"--output {output}: not empty and not of an earlier demo; choose another directory")
        _say(f"deleting the earlier demo in {output}")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def write_problems(data: Path) -> None:
    """Writes the data files. They do not overlap, but that "few" is the beginning of "many"."""
    problems = generate("train", seed=0)
    sets = {name: list(islice(problems, PROBLEMS[name])) for name in ("teacher", "many", "new")}
    sets["few"] = sets["many"][: PROBLEMS["few"]]
    sets["test"] = list(islice(generate("test", seed=0), PROBLEMS["test"]))
    for name, examples in sets.items():
        write_jsonl(data / f"{name}.jsonl", examples)
    _say(f"problems in {data}: " + ", ".join(f"{name} {len(examples)}" for name, examples in sets.items()))
    _say(f"for example: {sets['test'][0]['question']}\n{sets['test'][0]['solution']}")


def _say(text: str) -> None:
    print(text, flush=True)
