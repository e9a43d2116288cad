"""`kdkernels plan`: what a recipe takes of a machine with GPUs."""

import argparse
from pathlib import Path

from kdkernels.training.cli.common import add_set, count
from kdkernels.training.cli.train import run


def add(commands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe takes of a machine with GPUs: memory, seconds",
        description="Says what a recipe takes of a machine other than this one: memory of a GPU and seconds of a step, "
        "both itemised, and what to change where it does not fit. Needs no GPU, and no weights and no data where the "
        "models' configurations lie beside the recipe (models/NAME.json).",
    )
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")
    add_set(command)
    command.add_argument("--gpu", metavar="NAME", default="a100-80g", help="what kind they are (default: %(default)s)")
    command.add_argument("--gpus", metavar="N", type=count, default=1, help="how many (default: %(default)s)")
    command.add_argument("--save", metavar="FILE", type=Path, help="a new file for what is printed")


def _run(options: argparse.Namespace) -> int:
    options.recipes, options.dry_run, options.resume = [options.recipe], True, False
    return run(options)
