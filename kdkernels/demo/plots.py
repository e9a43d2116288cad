"""The demo's figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise ImportError("the demo's figures need matplotlib: pip install kdkernels[train]") from error

matplotlib.use("Agg")
from matplotlib import pyplot

from kdkernels.demo.report import interval
from kdkernels.demo.results import Arm

CURVES = {
    "loss": "loss (each arm's own)",
    "direct": "direct term",
    "student_entropy": "student entropy (nats)",
    "teacher_entropy": "teacher entropy (nats)",
    "gate": "gate, mean",
    "response_length": "response length (tokens)",
}
SMOOTHING = 15  # steps


def plot_accuracy(arms: Sequence[Arm], path: Path) -> None:
    """Exact match and sampled accuracy of every arm with their 95 % intervals."""
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(arms) + 1), layout="constrained")
    rows = np.arange(len(arms))[::-1]
    for offset, answers, color in ((0.2, "right", "C0"), (-0.2, "sampled_right", "C1")):
        for row, arm in zip(rows, arms, strict=True):
            right = getattr(arm, answers)
            axes.barh(row + offset, 100 * right.mean(), height=0.36, color=color, alpha=0.7)
            axes.plot([100 * bound for bound in interval(right)], [row + offset] * 2, color="black", linewidth=2)
    axes.set_yticks(rows, [arm.phase.name for arm in arms])
    axes.set_xlim(0, 100)
    axes.set_xlabel("right answers to held-out problems, %: greedy (blue), sampled (orange)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_curves(arms: Sequence[Arm], path: Path) -> None:
    """The training curves of all arms that have a teacher, means over seeds, smoothed over a few steps."""
    figure, panels = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    distilled = [arm for arm in arms if "teacher_entropy" in arm.steps[0][0]]
    for axes, (name, title) in zip(panels.flat, CURVES.items(), strict=True):
        for number, arm in enumerate(distilled):
            if name not in arm.steps[0][0]:
                continue
            values = np.mean([[line[name] for line in lines] for lines in arm.steps], axis=0)
            window = min(SMOOTHING, len(values))
            smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
            axes.plot(np.arange(window, len(values) + 1), smooth, color=f"C{number}", label=arm.phase.name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("log" if name in ("loss", "direct") else "linear")
    panels.flat[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
