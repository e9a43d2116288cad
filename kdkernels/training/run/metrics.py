"""metrics.jsonl as it is read again: without torch."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import InputError

Line = dict[str, float | None]  # of a metrics.jsonl: a step and its numbers, None for one that was not finite
EVALUATION = "evaluation/"  # what an evaluation measured is logged under this prefix
TIME = "time/"  # seconds of a phase
STALENESS = "rollout_staleness"  # steps since the responses were written
TOKENS_PER_SECOND, PEAK_MEMORY = "tokens_per_second", "peak_memory_gib"


def read_metrics(path: Path) -> list[Line]:
    """The complete lines of a metrics.jsonl, in order, without a last one that an interrupted run left unfinished. None
    is a number that was not finite. Raises InputError for a line that is no JSON object with a step.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            values["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: damaged: expected a JSON object with a step: {error}") from error
        lines.append(values)
    return lines


def by_outcome(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The lines of steps that were trained, and of those that were skipped; the evaluation before them is neither."""
    steps, trained, skipped = [line for line in lines if line["step"] > 0], [], []
    for before, line in itertools.pairwise([{}, *steps]):
        more = (line.get("skipped_steps") or 0) > (before.get("skipped_steps") or 0)
        (skipped if more else trained).append(line)
    return trained, skipped


def phases(lines: Sequence[Line]) -> dict[str, float]:
    """The seconds that the lines' steps spent in each phase."""
    names = dict.fromkeys(name for line in sorted(lines, key=lambda line: line["step"]) for name in line)
    return {
        name.removeprefix(TIME): sum(line.get(name) or 0 for line in lines) for name in names if name.startswith(TIME)
    }


def evaluations(lines: Sequence[Line]) -> dict[int, dict[str, float | None]]:
    """The evaluations among the lines of a metrics.jsonl, by step. None is a number that was not finite."""
    found = {
        line["step"]: {
            name.removeprefix(EVALUATION): value for name, value in line.items() if name.startswith(EVALUATION)
        }
        for line in lines
    }
    return {step: values for step, values in found.items() if values}
