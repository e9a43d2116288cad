"""The rehearsal's figure."""

from pathlib import Path

from kdkernels.demo.plots import pyplot
from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.demo.twt.results import Measured, Results


def plot_stages(results: Results, path: Path) -> None:
    """Accuracy against output tokens: the stages of TwT as a line, where the other arms end as points."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    way = {"start": results.before, **results.stages["twt"]}
    points = [(name, one.tokens.mean(), 100 * one.right.mean()) for name, one in way.items()]
    axes.plot([x for _, x, _ in points], [y for *_, y in points], color="tab:blue", zorder=1)
    for name, one in way.items():
        _point(axes, one, "tab:blue", f"TwT, {name}" if name != "start" else "starting student", (6, 6))
    others = [arm for arm in results.stages if arm != "twt"]
    for number, arm in enumerate(others, start=1):
        stage = list(results.stages[arm].values())[-1]
        _point(axes, stage, f"C{number}", f"{arm}, label", (14, -4 - 12 * (number - 2)))
    axes.set_xlabel("output tokens per answer, mean")
    axes.set_ylabel("right answers to held-out problems, %")
    axes.set_xlim(left=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _point(axes, measured: Measured, color: str, title: str, offset: tuple[int, int]) -> None:
    x, y = measured.tokens.mean(), 100 * measured.right.mean()
    low, high = (100 * bound for bound in bootstrap_mean(measured.right))
    axes.errorbar([x], [y], yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt="o", color=color, capsize=3)
    axes.annotate(title, (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=color)
