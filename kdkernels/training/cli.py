"""The command `kdkernels`."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from kdkernels.training import distributed
from kdkernels.training.atomic import writing
from kdkernels.training.config import Config, load_config
from kdkernels.training.dry_run import plan
from kdkernels.training.errors import DiskError, Stopped
from kdkernels.training.run_directory import RunDirectory
from kdkernels.training.schema import InputError
from kdkernels.training.trainer import train

DONE, DIVERGED, UNUSABLE, DISK, LOST, UNFORESEEN, INTERRUPTED = 0, 1, 2, 3, 4, 70, 130
STATUSES = """\
exit status, each but the first with a line that says why:
  0    the run is finished; or SIGTERM came, a checkpoint was written after the step under way, and --resume goes on
  1    the run diverged
  2    recipe, data, models or the run's directory cannot be used (another run may be in it), or the command line
  3    the disk did not take what the run had to write, for want of space or else
  4    another process of the run ended or stopped answering
  70   an error that none of these is, with a traceback: out of memory, or a fault of kdkernels
  130  interrupted (Ctrl-C)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; its exit status, of which `kdkernels train --help` says what it means (STATUSES)."""
    status = _run(_parser().parse_args(arguments))
    if status not in (LOST, UNFORESEEN, INTERRUPTED):  # of these, the others may know nothing yet
        distributed.leave()
    return status


def _run(options: argparse.Namespace) -> int:
    """What the options ask for; the exit status."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    config = None
    try:
        config = _read_recipe(options.recipe, options.set)
        if options.dry_run:
            text = plan(config, resume=options.resume)
            with writing(Path("standard output")):
                print(text, flush=True)
        else:
            train(config, resume=options.resume)
    except FloatingPointError as error:
        return _end(DIVERGED, error)
    except (InputError, OSError) as error:
        return _end(UNUSABLE, error)
    except DiskError as error:
        return _end(DISK, error)
    except (KeyboardInterrupt, Stopped) as error:
        stopped = isinstance(error, Stopped)
        text = str(error) if stopped else "interrupted"
        if config is not None and not options.dry_run:
            text += f"; {RunDirectory(config.run.output).way_on(config)}"
        if os.environ.get("RANK", "0") == "0":  # it is the same for all processes
            _end(DONE, text)
        return DONE if stopped else INTERRUPTED
    except Exception as error:
        if distributed.lost_process(error):
            return _end(
                LOST,
                "another process of the run ended, or did not answer in time ([run] timeout_seconds): "
                f"{str(error).splitlines()[0]}",
            )
        traceback.print_exc()  # Python itself would end with the status of a run that diverged
        return _end(UNFORESEEN, f"an error that nobody foresaw: {type(error).__name__}: {error}")
    return DONE


def _end(status: int, text: object) -> int:
    """Says `text` in one line; `status`."""
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and end with another status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"kdkernels: {' '.join(str(text).split())}", file=sys.stderr)
    return status


def _read_recipe(path: str, overrides: Sequence[str]) -> Config:
    """The recipe of all processes: where one cannot read it, all end."""
    try:
        config, error = load_config(path, overrides), None
    except InputError as caught:
        config, error = None, caught
    if error is not None and not distributed.launched():
        raise error
    distributed.start(*([config.run.timeout_seconds] if config else []))
    distributed.agree(error)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdkernels", description="Distillation of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "train",
        help="train the student of a recipe",
        description="Trains the student of a recipe.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("recipe", metavar="RECIPE.toml")
    command.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="overrides a key of the recipe; may be repeated",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in the run's directory, or from the beginning where there is none",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and the plan, train nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
