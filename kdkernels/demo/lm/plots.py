"""The figures of the demo of a language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdkernels.demo.lm.results import METRICS, Result, with_interval
from kdkernels.demo.lm.step_cost import ALL, GATHERED, OURS
from kdkernels.demo.plots import draw_bars, draw_smoothed, pyplot

SMOOTHING = 3  # steps
CURVES = {
    "loss": "loss (each arm's own)",
    "student_entropy": "student entropy (nats)",
    "gradient_norm": "gradient norm",
}


def plot_held_out(results: Sequence[Result], path: Path) -> None:
    """KL, cross-entropy and agreement of the start and every arm, with 95 % intervals over the held-out answers."""
    height = 0.4 * (len(results) + 1) + 1
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(14, height), sharey=True, layout="constrained")
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        bars = {"start": with_interval(results[0].before[metric])}
        bars |= {result.arm.name: with_interval(result.after[metric]) for result in results}
        draw_bars(axes, bars)
        axes.set_title(f"{title}, {'share of tokens' if metric == 'agreement' else 'nats a token'}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_curves(results: Sequence[Result], path: Path) -> None:
    """What every arm's steps logged."""
    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(14, 4), layout="constrained")
    for axes, (name, title) in zip(panels, CURVES.items(), strict=True):
        for number, result in enumerate(results):
            values = [line[name] for line in result.steps]
            draw_smoothed(axes, values, SMOOTHING, color=f"C{number}", label=result.arm.name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_yscale("linear" if name == "student_entropy" else "log")
    panels[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_step_cost(costs: Mapping[str, Mapping], path: Path) -> None:
    """Seconds and MiB of the loss, and of the whole step, each way."""
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 2.4), sharey=True, layout="constrained")
    parts = [(part, unit) for part in ("loss", "step") for unit in ("seconds", "mib")]
    for axes, (part, unit) in zip(panels, parts, strict=True):
        for row, way in enumerate((ALL, GATHERED, OURS)):
            bar = axes.barh(row, costs[way][part][unit] or 0, color="tab:orange" if way == OURS else "tab:gray")
            axes.bar_label(bar, fmt="%.2f" if unit == "seconds" else "%.0f", padding=2)
        axes.set_yticks(range(3), [ALL, GATHERED, OURS])
        axes.margins(x=0.2)
        axes.set_title(f"{part}, {'MiB' if unit == 'mib' else unit}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
