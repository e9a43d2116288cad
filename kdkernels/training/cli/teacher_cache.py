"""`kdkernels teacher-cache`: what a recipe's teacher says about the data's responses, stored."""

import argparse

from kdkernels.errors import InputError, MissingPackage, ServerError
from kdkernels.training import with_reason
from kdkernels.training.cli.common import add_set, count
from kdkernels.training.errors import DiskError
from kdkernels.training.processes.exits import DISK, DONE, SERVER, UNUSABLE, end
from kdkernels.training.processes.launcher import first
from kdkernels.training.recipe.read import read_recipe


def add(commands) -> None:
    command = commands.add_parser(
        "teacher-cache",
        help="store what a teacher says about the data's responses",
        description="Lets the teacher of a recipe score the data's responses once and stores its hidden states, its "
        "most probable words, or words that it draws, in the directory [teacher] cache; runs of the recipe then read "
        "them from there. Goes on where it was interrupted. Under torchrun, the processes share the data.",
    )
    command.set_defaults(run=_run)
    command.add_argument("recipe", metavar="RECIPE.toml")
    command.add_argument(
        "--top-k", metavar="K", type=count, help="the K most probable words of each token, in place of hidden states"
    )
    command.add_argument(
        "--sampled", action="store_true", help="K words that the teacher draws, in place of its most probable ones"
    )
    add_set(command)


def _run(options: argparse.Namespace) -> int:
    try:
        config = read_recipe(options.recipe, options.set)
        if config.teacher is None or config.teacher.cache is None or not (config.teacher.path or config.teacher.url):
            raise InputError(f"{options.recipe}: [teacher] expected a path or url, and the cache that is to be written")
        with with_reason():
            from kdkernels.training import caching  # torch, DeepSpeed, transformers: seconds
            from kdkernels.training.processes import distributed
            from kdkernels.training.recipe.read import complete
        status = DONE
        told = caching.cache(complete(config, options.recipe), options.top_k, options.sampled)
        if first():
            print(told, flush=True)
        distributed.leave()
    except (InputError, MissingPackage) as error:
        status = end(UNUSABLE, error)
    except DiskError as error:
        status = end(DISK, error)
    except ServerError as error:
        status = end(SERVER, error)
    return status
