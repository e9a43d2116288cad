"""`kdkernels rollout`: what a recipe needs before it trains, made once."""

import argparse

from kdkernels.training.cli.common import add_set
from kdkernels.training.cli.train import run


def add(commands) -> None:
    command = commands.add_parser(
        "rollout",
        help="write the teacher's and the student's responses, and a judge's scores of them, before training",
        description="Writes the responses of both models to the recipe's prompts ([responses]) and, where its "
        "objective needs a judge's weights, the scores of [judge]: whatever of it is missing. Killed, the same command "
        "goes on. Under torchrun, the processes share the work (docs/VCRD.md).",
    )
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")
    add_set(command)


def _run(options: argparse.Namespace) -> int:
    options.recipes, options.dry_run, options.resume, options.gpu = [options.recipe], False, False, None
    options.before = "rollout"
    return run(options)
