"""What `kdkernels report` says of runs side by side: their logs and recipes as Markdown. Read without torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import FINAL
from kdkernels.training.recipe.schema import read_toml, toml_value
from kdkernels.training.run.metrics import PEAK_MEMORY, Line, by_outcome, evaluations, phases, read_metrics

MEASURES = {  # of a step, as the tables and the figure name them
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "student_entropy": "student's entropy (nats)",
    "teacher_entropy": "teacher's entropy (nats)",
    "student_length": "student's length (tokens)",
    "teacher_length": "teacher's length (tokens)",
    "student_finished": "share of its responses that ended",
    "argmax_agreement": "share of tokens with one argmax",
    PEAK_MEMORY: "peak memory (GiB)",
}
SHOWN = 60  # characters of a setting


@dataclass(frozen=True)
class Logged:
    """A run as it is on the disk, whether it has ended or not. `settings`: its recipe by `section.key`."""

    name: str
    path: Path
    settings: dict[str, Any]
    lines: list[Line]
    finished: bool

    @cached_property
    def trained(self) -> list[Line]:
        """The lines of the steps that were not skipped."""
        return by_outcome(self.lines)[0]

    @cached_property
    def skipped(self) -> int:
        return len(by_outcome(self.lines)[1])

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By phase, of all steps."""
        return phases([line for line in self.lines if line["step"] > 0])

    @cached_property
    def evaluations(self) -> dict[int, dict[str, float | None]]:
        return evaluations(self.lines)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of the trained steps that have this number."""
        return [(line["step"], line[name]) for line in self.trained if line.get(name) is not None]


def read_runs(paths: Sequence[str]) -> list[Logged]:
    """The runs in these directories, named by as much of their paths as tells them apart.

    Raises:
        InputError: there is no run in one of them, two are the same, or a file is damaged.
    """
    places = [Path(os.path.realpath(path)) for path in paths]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"{paths[i]}: expected every run once, got it twice")
    return [_read(Path(path), name) for path, name in zip(paths, _names(places), strict=True)]


def render(runs: Sequence[Logged]) -> str:
    """The runs side by side, as Markdown."""
    lines = ["# Runs side by side" if len(runs) > 1 else f"# Run {runs[0].name}", ""]
    for run in runs:
        skipped = f", {run.skipped} more were skipped" if run.skipped else ""
        planned = run.settings.get("train.steps")
        last = run.lines[-1]["step"] if run.lines else 0
        state = "finished" if run.finished else f"not finished, at step {last} of {planned}"
        lines.append(f"- {run.name}: {run.path}, {state}; {len(run.trained)} steps{skipped}")
    blocks = {
        "Training": ("first tenth of the steps → last tenth, means", _training(runs)),
        "Held-out": ("first → last evaluation", _held_out(runs)),
        "Time": ("seconds of a step, and share", _time(runs)),
        "Settings that differ" if len(runs) > 1 else "Settings": ("key", _settings(runs)),
    }
    for title, (corner, rows) in blocks.items():
        if rows:
            lines += ["", f"## {title}", "", *_table([corner, *(run.name for run in runs)], rows)]
        if rows and title == "Training" and len({run.settings.get("objective.name") for run in runs}) > 1:
            lines += ["", "The objectives differ, and each has a loss of its own: these do not compare."]
    return "\n".join(lines) + "\n"


def _read(path: Path, name: str) -> Logged:
    log, recipe = path / "metrics.jsonl", path / "config.toml"
    for file in (recipe, log):
        if not file.is_file():
            raise InputError(f"{path}: expected the directory of a run ([run] output), but {file.name} is missing")
    tables = read_toml(recipe)
    if not all(isinstance(table, dict) for table in tables.values()):
        raise InputError(f"{recipe} is damaged: expected nothing but tables")
    settings = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return Logged(name, path, settings, read_metrics(log), (path / FINAL).is_dir())


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of every path, as many as it takes to tell it from the others."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _training(runs: Sequence[Logged]) -> list[list[str]]:
    rows = []
    for name, title in MEASURES.items():
        cells = [_from_to([value for _, value in run.series(name)]) for run in runs]
        rows += [[title, *cells]] if any(cells) else []
    return rows


def _from_to(values: Sequence[float]) -> str:
    if not values:
        return ""
    count = -(-len(values) // 10)
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    return f"{first:.4g} → {last:.4g}" if len(values) > 1 else f"{first:.4g}"


def _held_out(runs: Sequence[Logged]) -> list[list[str]]:
    measured = [run.evaluations for run in runs]
    names = dict.fromkeys(name for each in measured for values in each.values() for name in values)
    rows = []
    if any(measured):
        rows.append(["steps", *(" → ".join(map(str, _ends(each))) for each in measured)])
    for name in names:
        row = [name]
        for each in measured:
            ends = [each[step] for step in _ends(each)]
            text = " → ".join(_measured(values, name) for values in ends)
            both = len(ends) == 2 and all(values.get(name) is not None for values in ends)
            row.append(f"{text} ({ends[1][name] - ends[0][name]:+.4f})" if both else text)
        rows.append(row)
    return rows


def _measured(values: Line, name: str) -> str:
    if name not in values:
        return "not measured"
    return "not finite" if values[name] is None else f"{values[name]:.4f}"


def _ends(measured: dict[int, Any]) -> list[int]:
    """The steps of the first and the last evaluation."""
    return sorted({min(measured), max(measured)}) if measured else []


def _time(runs: Sequence[Logged]) -> list[list[str]]:
    names = dict.fromkeys(name for run in runs for name in run.seconds)
    if not names:
        return []
    rows, totals = [], [sum(run.seconds.values()) for run in runs]
    counts = [len(run.trained) + run.skipped for run in runs]
    for name in names:
        cells = [
            f"{run.seconds[name] / count:.3g} ({run.seconds[name] / total:.0%})" if name in run.seconds else ""
            for run, count, total in zip(runs, counts, totals, strict=True)
        ]
        rows.append([name, *cells])
    whole = zip(totals, counts, strict=True)
    rows.append(["all", *(f"{total / count:.3g}" if count else "" for total, count in whole)])
    tokens = [sum(line.get("tokens") or 0 for line in run.trained) for run in runs]
    rates = zip(tokens, totals, strict=True)
    rows.append(["response tokens a second", *(f"{count / total:.4g}" if total else "" for count, total in rates)])
    return [*rows, ["response tokens", *map(str, tokens)]]


def _settings(runs: Sequence[Logged]) -> list[list[str]]:
    """A row a key in which the runs differ; of a single run, every key."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if key != "run.output" and (len(runs) == 1 or any(value != values[0] for value in values)):
            rows.append([key, *map(_setting, values)])
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    text = toml_value(value)
    return f"`{text if len(text) <= SHOWN else text[: SHOWN - 3] + '...'}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return [
        f"| {' | '.join(cells[0])} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in cells[1:]),
    ]
