"""The figure of `kdkernels report`: runs side by side over their steps, a panel a question."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from kdkernels.training.run.compare import Logged

# of colour-blind readers too (Okabe and Ito); a run has one everywhere
MARKERS = "osD^vPX"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PHASES = ("#3B5B92", "#7A9CC6", "#C9A227", "#B5B5B5", "#8C6BB1", "#4D9078", "#D98880")
STEPS = {  # title: the numbers of a step in it, the first as a solid line, the second dashed
    "loss": ("loss",),
    "entropy (nats)": ("student_entropy", "teacher_entropy"),
    "length (tokens)": ("student_length", "teacher_length"),
    "gradient norm": ("gradient_norm",),
}
STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 130,
    "font.size": 9.5,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}
LOGARITHMIC = 20  # a panel whose values differ by more has a logarithmic axis
COLUMNS, WIDTH, HEIGHT = 3, 4.6, 3.1  # of a panel in inches


def draw(runs: Sequence[Logged], path: Path) -> None:
    """Writes the PNG. Raises OSError."""
    colours = dict(zip((run.name for run in runs), itertools.cycle(COLOURS)))
    panels = []
    for title, names in STEPS.items():
        if any(run.series(name) for run in runs for name in names):
            panels.append((title, lambda axes, names=names: _steps(axes, runs, names, colours)))
    for name in dict.fromkeys(name for run in runs for values in run.evaluations.values() for name in values):
        panels.append((f"held-out: {name}", lambda axes, name=name: _held_out(axes, runs, name, colours)))
    if any(run.seconds for run in runs):
        panels.append(("seconds of a step", lambda axes: _seconds(axes, runs)))
    columns = max(1, min(COLUMNS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in itertools.zip_longest(grid, panels):
            if panel is None:
                axes.set_axis_off()
                continue
            axes.set_title(panel[0])
            axes.set_axisbelow(True)
            panel[1](axes)
        handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 2 * columns), fontsize=11)
        figure.savefig(path, format="png")


def _steps(axes: Axes, runs: Sequence[Logged], names: Sequence[str], colours: dict[str, str]) -> None:
    """Every step faintly, and the mean over some of them."""
    drawn, styles = set(), ("-", (0, (4, 2)))
    for run in runs:
        for name, style in zip(names, styles, strict=False):
            points = run.series(name)
            if not points:
                continue
            drawn.add(name)
            window = max(1, len(points) // 25)
            steps, values = zip(*points, strict=True)
            if window > 1:
                axes.plot(steps, values, color=colours[run.name], alpha=0.18, linewidth=0.8)
            means = [_mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
            axes.plot(steps, means, color=colours[run.name], linewidth=1.8, linestyle=style)
    if len(names) > 1:
        shown = [(name, style) for name, style in zip(names, styles, strict=False) if name in drawn]
        handles = [
            Line2D([], [], color="#555555", linestyle=style, label=name.partition("_")[0]) for name, style in shown
        ]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=2, handlelength=2.2)
    _scale(axes, [value for run in runs for name in names for _, value in run.series(name)])


def _held_out(axes: Axes, runs: Sequence[Logged], name: str, colours: dict[str, str]) -> None:
    for run, marker in zip(runs, itertools.cycle(MARKERS)):
        points = [(step, values[name]) for step, values in run.evaluations.items() if values.get(name) is not None]
        if points:
            style = {"color": colours[run.name], "marker": marker, "markersize": 5, "linewidth": 1.8, "alpha": 0.85}
            axes.plot(*zip(*points, strict=True), **style)
    _whole_steps(axes)


def _seconds(axes: Axes, runs: Sequence[Logged]) -> None:
    """A bar a run, of its phases."""
    names = dict.fromkeys(name for run in runs for name in run.seconds)
    colours = dict(zip(names, itertools.cycle(PHASES)))
    starts = dict.fromkeys((run.name for run in runs), 0.0)
    for name, colour in colours.items():
        lengths = [run.seconds.get(name, 0) / max(1, len(run.trained) + run.skipped) for run in runs]
        axes.barh(list(starts), lengths, left=list(starts.values()), color=colour, height=0.6, label=name)
        starts = {run: start + more for (run, start), more in zip(starts.items(), lengths, strict=True)}
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, handlelength=1, columnspacing=1)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    _whole_steps(axes)
    if values and min(values) > 0 and max(values) > LOGARITHMIC * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1e3 * min(values) else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif values and min(values) >= 0:
        axes.set_ylim(bottom=0)


def _whole_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
