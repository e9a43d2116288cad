"""report.md: what a run was, what it was given, and what its evaluations measured before and after."""

import resource
from collections.abc import Mapping, Sequence

from kdkernels.data import Examples
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.atomic import write_text
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.history import changes
from kdkernels.training.run.metrics import by_outcome, evaluations, phases, read_metrics


def write_report(run: RunDirectory, config: Config, data: Sequence[Examples], start: int) -> None:
    """Writes the report of a run that is trained; all processes call this together. `start`: the step after which these
    processes began (0, or where they resumed the run). Raises DiskError.
    """
    peaks = distributed.gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    distributed.by_first(lambda: write_text(run.report, render_report(run, config, data, start, peaks)))


def render_report(
    run: RunDirectory, config: Config, data: Sequence[Examples], start: int, peaks: Sequence[float]
) -> str:
    """The report as Markdown. `peaks`: of the resident memory of each process, in MiB."""
    log = read_metrics(run.metrics)
    trained, skipped = by_outcome(log)
    steps = trained + skipped
    seconds = phases(steps)
    spent = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
    since = f" since it was resumed after step {start}" if start else ""
    lines = [
        f"# {config.objective.name}: {run.root}",
        "",
        f"- {len(trained)} steps of {config.train.batch_size} responses, "
        f"{sum(line.get('tokens') or 0 for line in trained)} response tokens",
    ]
    if len(steps) < config.train.steps:
        lines.append(f"- of {config.train.steps} steps: the log has lost the others, which nothing below counts")
    lines += [f"- changed after step {step}: {what}" for step, what in changes(run.config)]
    if skipped:
        first = ", ".join(str(line["step"]) for line in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        lines.append(f"- {len(skipped)} more steps skipped, their loss or gradient was not finite: {first}")
    lines += [
        f"- seconds in the steps, evaluations and checkpoints not counted{_first(len(peaks))}: "
        f"{sum(seconds.values()):.1f} ({spent})",
        f"- peak resident memory{since}: " + ", ".join(f"{peak:.0f} MiB" for peak in peaks) + _of(len(peaks)),
        *(f"- {examples}" for examples in data),
    ]
    if config.evaluation is not None and config.evaluation.limit is not None:
        lines.append(f"- evaluated on the first {config.evaluation.limit} of the held-out examples at most")
    lines += ["", "```", data[0].first, "```", ""]
    return "\n".join([*lines, *_table(evaluations(log))])


def _first(processes: int) -> str:
    return "" if processes == 1 else ", on process 0"


def _of(processes: int) -> str:
    return "" if processes == 1 else f" (processes 0 to {processes - 1})"


def _table(measured: Mapping[int, Mapping[str, float | None]]) -> list[str]:
    """What the first and the last evaluation measured."""
    if not measured:
        return []
    first, last = measured[min(measured)], measured[max(measured)]
    lines = [f"| held-out | step {min(measured)} | step {max(measured)} | change |", "|---|---|---|---|"]
    for name in dict.fromkeys([*first, *last]):
        before, after = first.get(name), last.get(name)
        change = "" if before is None or after is None else f"{after - before:+.4f}"
        lines.append(f"| {name} | {_number(first, name)} | {_number(last, name)} | {change} |")
    return [*lines, ""]


def _number(values: Mapping[str, float | None], name: str) -> str:
    if name not in values:
        return "not measured"
    return "not finite" if values[name] is None else f"{values[name]:.4f}"
