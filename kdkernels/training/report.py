"""report.md: what a run was, what it was given, and what its evaluations measured before and after."""

import resource
from collections.abc import Iterable

from kdkernels.training import distributed
from kdkernels.training.atomic import write_text
from kdkernels.training.config import Config
from kdkernels.training.data import Examples
from kdkernels.training.metrics import evaluations, read_metrics
from kdkernels.training.run import RunDirectory


def write_report(run: RunDirectory, config: Config, data: Iterable[Examples]) -> None:
    """Writes the report of a finished run, on rank 0."""
    if distributed.rank() == 0:
        write_text(run.report, render_report(run, config, data))


def render_report(run: RunDirectory, config: Config, data: Iterable[Examples]) -> str:
    """The report as Markdown."""
    steps = [line for line in read_metrics(run.metrics) if line["step"] > 0]
    phases = {name: sum(line[name] for line in steps) for name in steps[0] if name.startswith("time/")}
    spent = ", ".join(f"{name.removeprefix('time/')} {seconds:.1f}" for name, seconds in phases.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = sum(line["tokens"] for line in steps)
    lines = [
        f"# {config.objective.name}: {run.root}",
        "",
        f"- {len(steps)} steps of {config.train.batch_size} responses, {tokens} response tokens",
        f"- seconds in the steps: {sum(phases.values()):.1f} ({spent})",
        f"- peak resident memory of the main process: {peak:.0f} MiB",
        *(f"- {examples}" for examples in data),
        "",
    ]
    measured = evaluations(run.metrics)
    if measured:
        first, last = measured[min(measured)], measured[max(measured)]
        lines += ["| held-out | before | after | change |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {first[name]:.4f} | {last[name]:.4f} | {last[name] - first[name]:+.4f} |" for name in first
        ]
        lines.append("")
    return "\n".join(lines)
