"""The demo's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise ImportError("the demo's figures need matplotlib: pip install kdkernels[report]") from error

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
    "student_length": "response length (tokens)",
}
SMOOTHING = 15  # steps


def draw_bars(axes: pyplot.Axes, values: Mapping[str, Sequence[float]]) -> None:
    """A bar for each name, the first one on top: of its value, with the interval from low to high over it."""
    for row, (value, low, high) in enumerate(reversed(values.values())):
        axes.barh(row, value, color="tab:blue", alpha=0.6)
        axes.plot([low, high], [row, row], color="black", linewidth=2)
    axes.set_yticks(range(len(values)), list(reversed(values)))


def draw_smoothed(axes: pyplot.Axes, values: Sequence[float], window: int, **options) -> None:
    """A curve over the steps, each the mean of the last `window` of them."""
    window = min(window, len(values))
    smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(window, len(values) + 1), smooth, **options)


def plot_accuracy(arms: Sequence[Arm], path: Path) -> None:
    """Exact match of every arm with its 95 % interval."""
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(arms) + 1), layout="constrained")
    percent = {arm.phase.name: [100 * bound for bound in (arm.accuracy(), *interval(arm))] for arm in arms}
    draw_bars(axes, percent)
    axes.set_xlim(0, 100)
    axes.set_xlabel("exact match on held-out problems, %")
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
            draw_smoothed(axes, values, SMOOTHING, color=f"C{number}", label=arm.phase.name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("log" if name in ("loss", "direct") else "linear")
    panels.flat[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
