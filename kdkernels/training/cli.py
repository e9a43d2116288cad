"""The command `kdkernels`."""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from kdkernels.training import distributed
from kdkernels.training.config import Config, load_config
from kdkernels.training.plan import plan
from kdkernels.training.schema import InputError
from kdkernels.training.trainer import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Its exit status is 0, or after a line that says why 1 (the run diverged), 2 (input that
    cannot be used) or 4 (another process of the run ended or stopped answering).
    """
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        config = _read_recipe(options.recipe, options.set)
        if options.dry_run:
            print(plan(config, resume=options.resume))
        else:
            train(config, resume=options.resume)
    except FloatingPointError as error:
        print(f"kdkernels: {error}", file=sys.stderr)
        return 1
    except (InputError, OSError) as error:
        print(f"kdkernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        if not distributed.lost_process(error):
            raise
        print(
            "kdkernels: another process of the run ended, or did not answer in time ([run] timeout_seconds): "
            f"{str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 4
    return 0


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
        "train", help="train the student of a recipe", description="Trains the student of a recipe."
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
        "--resume", action="store_true", help="continue from the latest checkpoint in the run's directory"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and the plan, train nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
