"""The rehearsal's figure."""

from pathlib import Path

from kdkernels.demo.plots import pyplot
from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.demo.twt.results import Measured, Results

# of the titles beside their points, in points
PLACES = {"start": (14, -80), "full": (-30, -78), "compressed": (-98, -3), "label": (-62, -4)}


def plot_stages(results: Results, path: Path) -> None:
    """Accuracy against output tokens: the stages of TwT as a line, where the other arms end as points."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    way = {"start": results.before, **results.stages["twt"]}
    points = [(name, one.tokens.mean(), 100 * one.right.mean()) for name, one in way.items()]
    axes.plot([x for _, x, _ in points], [y for *_, y in points], color="tab:blue", zorder=1)
    for name, one in way.items():
        title = "starting student" if name == "start" else f"TwT, {name}"
        _point(axes, one, "tab:blue", title, PLACES[name])
    for number, arm in enumerate((arm for arm in results.stages if arm != "twt"), start=1):
        for name, stage in results.stages[arm].items():
            title = arm if name == "label" else None
            _bar(axes, stage, f"C{number}", 0.35 * number, title)  # beside each other
    axes.set_xlabel("output tokens per answer, mean (the arms beside TwT's a little further right)")
    axes.set_ylabel("right answers to held-out problems, %")
    axes.set_xlim(0, 1.3 * max(x for _, x, _ in points))
    axes.legend(title="other arms, each stage", loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _point(axes, measured: Measured, color: str, title: str, offset: tuple[int, int]) -> None:
    _bar(axes, measured, color)
    place = (measured.tokens.mean(), 100 * measured.right.mean())
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
    axes.annotate(title, place, xytext=offset, textcoords="offset points", fontsize=8, color=color, arrowprops=line)


def _bar(axes, measured: Measured, color: str, beside: float = 0.0, label: str | None = None) -> None:
    """A point with its interval."""
    x, y = measured.tokens.mean() + beside, 100 * measured.right.mean()
    low, high = (100 * bound for bound in bootstrap_mean(measured.right))
    error = [[max(0.0, y - low)], [max(0.0, high - y)]]
    axes.errorbar([x], [y], yerr=error, fmt="o", color=color, capsize=3, markersize=4, label=label)
