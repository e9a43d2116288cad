"""`kdkernels train`. What is wrong with a recipe is told before torch and DeepSpeed are imported."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields

import kdkernels
from kdkernels.errors import InputError, MissingPackage
from kdkernels.training import with_reason
from kdkernels.training.cli.common import EXAMPLES, add_plan, add_set
from kdkernels.training.processes.exits import STATUSES, UNUSABLE, end
from kdkernels.training.processes.launcher import first, launched
from kdkernels.training.recipe.config import TEACHERS, Config
from kdkernels.training.recipe.read import section_class
from kdkernels.training.recipe.stages import REASONING, STAGES, ReasoningConfig, StageConfig, read_recipes


def add(commands, compressor: Callable | None = None) -> None:
    """compressor: returns what makes the data of stages of compressed rationales, and loads what that takes."""
    command = commands.add_parser(
        "train",
        help="train the student of a recipe, or in stages, of several",
        description="Trains the student of a recipe. Several recipes are stages, trained one after another: a later "
        "one may start from the model of an earlier one ([student] path). So are the [[stages]] of one recipe, each "
        "from the model of the one before. A finished stage is skipped and a begun one resumed, with --resume or "
        "without.",
        epilog=f"{EXAMPLES}\n{_keys()}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_train, compressor=compressor)
    command.add_argument("recipes", metavar="RECIPE.toml", nargs="+")
    add_set(command)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in the run's directory, or from the beginning where there is none",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and the plan, train nothing"
    )
    add_plan(command.add_argument_group("with --dry-run"))


def _train(options: argparse.Namespace) -> int:
    if options.dry_run and len(options.recipes) > 1:
        return end(
            UNUSABLE, f"--dry-run: expected one recipe, got {len(options.recipes)}: give it one stage after another"
        )
    of_plan = {"--gpu": options.gpu, "--gpus": options.gpus, "--save": options.save}
    given = [name for name, value in of_plan.items() if value is not None]
    if given and not options.dry_run:
        return end(UNUSABLE, f"{', '.join(given)}: of a plan, and this would train: add --dry-run")
    if options.gpus is not None and options.gpu is None:
        return end(UNUSABLE, "--gpus: expected with --gpu, the name of their kind")
    return run(options, options.compressor)


def run(options: argparse.Namespace, compressor: Callable | None = None) -> int:
    """Trains, or says what training would do, or makes what has to be there before."""
    sources = options.recipes
    try:
        recipes = read_recipes(sources, options.set, options.dry_run)
    except MissingPackage as error:
        return end(UNUSABLE, error)
    except InputError as error:
        if not launched():
            return end(UNUSABLE, error)
        recipes = error  # the other processes must hear of it
    if first():
        told = f"kdkernels {kdkernels.__version__}: {', '.join(sources)}: loading libraries"
        print(told, file=sys.stderr, flush=True)
    try:
        with with_reason():
            from kdkernels.training import command  # torch, DeepSpeed, transformers: seconds

            made = compressor and compressor()
    except MissingPackage as error:
        return end(UNUSABLE, error)
    machine = None
    if options.gpu is not None:
        try:
            machine = command.machine(options.gpu, options.gpus or 1)
        except InputError as error:
            return end(UNUSABLE, error)
    dry_run = command.DryRun(machine, options.save) if options.dry_run else None
    asked = [assignment.partition("=")[0].replace(" ", "") for assignment in options.set]
    before = options.before if "before" in options else None
    return command.run(recipes, resume=options.resume, asked=asked, dry_run=dry_run, compressor=made, before=before)


def _keys() -> str:
    """The keys of a recipe, a section a line."""
    lines = ["keys of a recipe (docs/RECIPES.md says what each means):"]
    lines.append("  extends: another recipe; it stands above all sections")
    for section in fields(Config):
        if section.name == TEACHERS:
            lines.append(f"  [{TEACHERS}.NAME] as [teacher]")
            continue
        names = [entry.name for entry in fields(section_class(section.type))]
        names = [name if name != "options" else "the options of that objective" for name in names]
        lines.append(
            textwrap.fill(", ".join(names), 100, initial_indent=f"  [{section.name}] ", subsequent_indent=" " * 6)
        )
    for title, kind in ((f"[{REASONING}]", ReasoningConfig), (f"[[{STAGES}]]", StageConfig)):
        names = ", ".join(entry.name for entry in fields(kind))
        lines.append(textwrap.fill(names, 100, initial_indent=f"  {title} ", subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"
