"""`kdkernels new`: a recipe to start from."""

import argparse
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.processes.exits import DONE, UNUSABLE, end
from kdkernels.training.recipe.new import write_recipe


def add(commands) -> None:
    command = commands.add_parser("new", help="write a commented recipe", description="Writes a commented recipe.")
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")


def _run(options: argparse.Namespace) -> int:
    try:
        write_recipe(Path(options.recipe))
    except InputError as error:
        return end(UNUSABLE, error)
    print(f"{options.recipe}: change its paths, then: kdkernels train {options.recipe} --dry-run")
    return DONE
