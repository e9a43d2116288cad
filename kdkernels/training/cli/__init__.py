"""The trainer's commands, one file each: what they ask for, and what they do with it. Also `python -m` this package.

Help is told before torch and DeepSpeed are imported: a command imports them when it runs.
"""

import argparse
import traceback
from collections.abc import Callable, Sequence

import kdkernels
from kdkernels.training.cli import evaluate, export, new, plan, report, rollout, teacher_cache, teacher_serve, train
from kdkernels.training.cli.common import EXAMPLES
from kdkernels.training.processes.exits import STATUSES, UNFORESEEN, end

COMMANDS = (
    train.add, plan.add, rollout.add, evaluate.add, report.add, export.add, new.add, teacher_cache.add,
    teacher_serve.add,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None, commands: Sequence[Callable] = COMMANDS) -> int:
    """Runs the command line.

    Args:
        arguments: those of the process by default.
        commands: each adds its own to argparse's subparsers: a parser with a default `run`, which takes what was parsed
            and returns an exit status.

    Returns:
        The exit status (exits.STATUSES, which `kdkernels train --help` shows).
    """
    options = _parser(commands).parse_args(arguments)
    try:
        return options.run(options)
    except Exception as error:  # what is foreseen has a status already
        traceback.print_exc()  # Python itself would end with the status of a run that diverged
        return end(UNFORESEEN, f"an error that nobody foresaw: {type(error).__name__}: {error}")


def _parser(commands: Sequence[Callable]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdkernels",
        description="Distillation of language models from recipes, which are TOML files.",
        epilog=f"{EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {kdkernels.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in commands:
        add(subparsers)
    return parser
