"""`kdkernels plan`: what a recipe takes of a machine with GPUs."""

import argparse

from kdkernels.training.cli.common import add_plan, add_set
from kdkernels.training.cli.train import run


def add(commands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe takes of a machine with GPUs: memory, seconds",
        description="Says what a recipe takes of a machine other than this one: memory of a GPU and seconds of a step, "
        "both itemised, and what to change where it does not fit. Needs no GPU, and no weights and no data where the "
        "models' configurations lie beside the recipe (models/NAME.json). The same as train --dry-run --gpu NAME.",
    )
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")
    add_set(command)
    add_plan(command, gpu="a100-80g")


def _run(options: argparse.Namespace) -> int:
    options.recipes, options.dry_run, options.resume = [options.recipe], True, False
    return run(options)
