"""`kdkernels report`: runs side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training.cli.common import show
from kdkernels.training.processes.exits import UNUSABLE, end


def add(commands) -> None:
    command = commands.add_parser(
        "report",
        help="compare runs",
        description="Compares runs, ended or not: losses, entropies, lengths, evaluations, seconds by phase, and the "
        "settings that differ. Prints Markdown, and writes it with a figure.",
    )
    command.set_defaults(run=_run)
    command.add_argument("runs", metavar="RUN", nargs="+", help="the directory of a run ([run] output of its recipe)")
    command.add_argument(
        "--output",
        metavar="NAME",
        default="kdkernels-report",
        help="writes NAME.md and NAME.png, over older ones (default: %(default)s)",
    )
    command.add_argument(
        "--no-figure", dest="figure", action="store_false", help="no figure, which needs matplotlib (kdkernels[report])"
    )


def _run(options: argparse.Namespace) -> int:
    from kdkernels.training.run.compare import read_runs, render

    text, figure = Path(f"{options.output}.md"), Path(f"{options.output}.png")
    try:
        runs = read_runs(options.runs)
        report = render(runs)
        if options.figure:
            _draw(runs, figure)
        text.write_text(report + (f"\n![{figure.name}]({figure.name})\n" if options.figure else ""), encoding="utf-8")
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    except OSError as error:
        return end(UNUSABLE, f"--output: {error.filename} cannot be written: {error.strerror}")
    return show(f"{report}\n{', '.join(map(str, [text, figure] if options.figure else [text]))}")


def _draw(runs: Sequence, path: Path) -> None:
    try:
        from kdkernels.training.run.figure import draw  # seconds
    except ModuleNotFoundError as error:
        if error.name.startswith("kdkernels"):
            raise
        needs = f"the figure needs {error.name}: pip install kdkernels[report], or --no-figure"
        raise MissingPackage(needs) from error
    draw(runs, path)
