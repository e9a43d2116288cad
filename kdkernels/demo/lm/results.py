"""What the arms of the demo of a language model measured, read back from their runs.

Axes: P held-out answers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdkernels.demo.lm.phases import Arm
from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import PEAK_MEMORY, TIME, read_metrics

METRICS = {  # and in words
    "kl": "KL to the teacher",
    "cross_entropy": "cross-entropy",
    "agreement": "agreement (top 1)",
}
CLEARLY = 0.9  # of the start's KL, at most, for an arm that has learnt


@dataclass(frozen=True)
class Result:
    """One arm. before, after: {metric: [P]}, means over each held-out answer's tokens. steps: lines of metrics.jsonl,
    the evaluation before them left out.
    """

    arm: Arm
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    steps: list[dict[str, float]]

    def gain(self, metric: str) -> tuple[float, float, float]:
        """After minus before: the mean over the answers, and its 95 % interval (paired bootstrap)."""
        return with_interval(self.after[metric] - self.before[metric])

    def learnt(self) -> bool:
        """Whether the KL to the teacher fell clearly: all of the interval below 0, and by a tenth at least."""
        ratio = self.after["kl"].mean() / self.before["kl"].mean()
        return bool(self.gain("kl")[2] < 0 and ratio <= CLEARLY)

    def seconds(self, part: str | None = None) -> float:
        """Seconds of its steps, or of one part of them."""
        names = [name for name in self.steps[0] if name.startswith(TIME)] if part is None else [TIME + part]
        return sum(line.get(name) or 0.0 for line in self.steps for name in names)

    def peak(self) -> float:
        """GiB, the most that the process has held up to the arm's end."""
        return max(line[PEAK_MEMORY] for line in self.steps)

    def tokens(self) -> float:
        """Response tokens trained on."""
        return sum(line["tokens"] for line in self.steps)


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of [P] values and its 95 % bootstrap interval."""
    return float(values.mean()), *bootstrap_mean(values[None].astype(float))


def load_result(arm: Arm, directory: Path) -> Result:
    """The finished run of `arm` in its directory."""
    run = RunDirectory(directory)
    lines = read_metrics(run.metrics)
    before, after = (_records(run.evaluation(line["step"])) for line in (lines[0], lines[-1]))
    return Result(arm, before, after, [line for line in lines if line["step"] > 0])


def _records(file: Path) -> dict[str, np.ndarray]:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {metric: np.array([record[metric] for record in records]) for metric in METRICS}
