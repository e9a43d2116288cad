"""What the runs of a demo measured, read back from their directories.

Shapes: S seeds, P held-out problems.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdkernels.demo.phases import Cost, Phase, directory
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import read_metrics


@dataclass(frozen=True)
class Arm:
    """The runs of one phase, over its seeds.

    right, finished: [S, P] bool, whether each held-out problem was answered correctly, and with an end-of-sequence
    token. steps: the lines of metrics.jsonl of every seed, step 0 left out. costs: of every seed.
    """

    phase: Phase
    right: np.ndarray
    finished: np.ndarray
    steps: tuple[list[dict[str, float]], ...]
    costs: tuple[Cost, ...]

    def accuracy(self) -> float:
        """Share of right answers over all seeds and problems."""
        return float(self.right.mean())

    def tokens(self) -> float:
        """Response tokens trained on, mean over the seeds."""
        return sum(line["tokens"] for lines in self.steps for line in lines) / len(self.steps)

    def seconds(self, part: str) -> float:
        """Seconds of one part of the steps (rollout, teacher, student, step), mean over the seeds."""
        return sum(line.get(f"time/{part}", 0.0) for lines in self.steps for line in lines) / len(self.steps)


def load_arm(phase: Phase, output: Path, seeds: Sequence[int], costs: Mapping[str, Cost]) -> Arm:
    """The finished runs of `phase` below `output`; `costs` by run directory below it."""
    names = list(dict.fromkeys(directory(phase, Path(), seed).as_posix() for seed in seeds))
    steps, right, finished = [], [], []
    for name in names:
        run = RunDirectory(output / name)
        lines = read_metrics(run.metrics)
        steps.append([line for line in lines if line["step"] > 0])
        text = run.evaluation(lines[-1]["step"]).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        right.append([record["correct"] for record in records])
        finished.append([record["finished"] for record in records])
    return Arm(phase, np.array(right), np.array(finished), tuple(steps), tuple(costs[name] for name in names))
