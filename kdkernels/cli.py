"""The command `kdkernels`. Help, and what is wrong with a recipe, is told before torch and DeepSpeed are imported."""

import argparse
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import kdkernels
from kdkernels.errors import MissingPackage
from kdkernels.training import Config, InputError, with_reason
from kdkernels.training.processes.exits import DISK, DONE, STATUSES, UNFORESEEN, UNUSABLE, end
from kdkernels.training.processes.launcher import first, launched
from kdkernels.training.recipe.measuring import ANSWER, PROMPT, RESPONSE, measuring
from kdkernels.training.recipe.new import write_recipe
from kdkernels.training.recipe.read import read_recipes, section_class

EXAMPLES = """\
examples:
  kdkernels export runs/mine/checkpoints/step-000050 models/step-50    make a model of a checkpoint
  kdkernels new recipe.toml                             write a recipe with every key explained
  kdkernels train recipe.toml --dry-run                 check everything, show the plan, train nothing
  kdkernels plan recipe.toml --gpu a100-80g --gpus 8    what it takes of another machine: memory, seconds
  kdkernels train recipe.toml --set train.steps=100     train, with one key of the recipe changed
  kdkernels train recipe.toml --resume                  go on after a crash, bit for bit; begin if there is nothing yet
  kdkernels train recipe.toml --resume --set train.steps=200    more steps than it had, or another [optimizer] lr
  kdkernels train first.toml second.toml                train in stages; the same again goes on after a crash
  torchrun --nproc-per-node 8 -m kdkernels train recipe.toml
  kdkernels eval runs/a/final gsm8k_test.jsonl         how often a model's answers are right
  kdkernels report runs/a runs/b                        compare runs, in Markdown and a figure
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status (exits.STATUSES, which `kdkernels train --help` shows).
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except Exception as error:  # what is foreseen has a status already
        traceback.print_exc()  # Python itself would end with the status of a run that diverged
        return end(UNFORESEEN, f"an error that nobody foresaw: {type(error).__name__}: {error}")


def _train(options: argparse.Namespace) -> int:
    if options.dry_run and len(options.recipes) > 1:
        return end(
            UNUSABLE, f"--dry-run: expected one recipe, got {len(options.recipes)}: give it one stage after another"
        )
    if options.save is not None and not options.dry_run:
        return end(UNUSABLE, "--save says where a plan goes: add --dry-run")
    return _run(options)


def _plan(options: argparse.Namespace) -> int:
    options.recipes, options.dry_run, options.resume = [options.recipe], True, False
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Trains, or says what training would do."""
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
    except MissingPackage as error:
        return end(UNUSABLE, error)
    machine = None
    if "gpu" in options:
        try:
            machine = command.machine(options.gpu, options.gpus)
        except InputError as error:
            return end(UNUSABLE, error)
    dry_run = command.DryRun(machine, options.save) if options.dry_run else None
    asked = [assignment.partition("=")[0].replace(" ", "") for assignment in options.set]
    return command.run(recipes, sources, resume=options.resume, asked=asked, dry_run=dry_run)


def _new(options: argparse.Namespace) -> int:
    try:
        write_recipe(Path(options.recipe))
    except InputError as error:
        return end(UNUSABLE, error)
    print(f"{options.recipe}: change its paths, then: kdkernels train {options.recipe} --dry-run")
    return DONE


def _eval(options: argparse.Namespace) -> int:
    output = Path(options.output)
    try:
        if bool(options.data) == bool(options.lm_eval):
            raise InputError("eval: expected either DATA.jsonl or --lm-eval")
        if not output.parent.is_dir():
            raise InputError(f"--output: no such directory: {output.parent}")
        if options.lm_eval:
            from kdkernels.training import harness

            chosen = harness.tasks(options.lm_eval, options.run_code)
            return _print(harness.measure(options.model, chosen, output, options))
        for name in ("chat", "run_code"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} belongs to --lm-eval, which is not given")
        config = measuring(options)
        with with_reason():
            from kdkernels.training.measuring import run  # torch, transformers: seconds
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    return run(config, output)


def _export(options: argparse.Namespace) -> int:
    from kdkernels.training.errors import DiskError

    try:
        with with_reason():
            from kdkernels.training.export import export  # torch, DeepSpeed, transformers: seconds
        export(Path(options.checkpoint), Path(options.directory))
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    except DiskError as error:
        return end(DISK, error)
    print(f"model: {options.directory}")
    return DONE


def _report(options: argparse.Namespace) -> int:
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
    return _print(f"{report}\n{', '.join(map(str, [text, figure] if options.figure else [text]))}")


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except OSError as error:
        return end(DISK, f"standard output: cannot be written: {error.strerror}")
    return DONE


def _draw(runs: Sequence, path: Path) -> None:
    try:
        from kdkernels.training.run.figure import draw  # seconds
    except ModuleNotFoundError as error:
        if error.name.startswith("kdkernels"):
            raise
        needs = f"the figure needs {error.name}: pip install kdkernels[report], or --no-figure"
        raise MissingPackage(needs) from error
    draw(runs, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdkernels",
        description="Distillation of language models from recipes, which are TOML files.",
        epilog=f"{EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {kdkernels.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_report(commands)
    export = commands.add_parser(
        "export",
        help="make a model of a checkpoint",
        description="Writes the student of a checkpoint and its tokenizer as final/ has them at the end of a run.",
    )
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", metavar="RUN/checkpoints/step-000123")
    export.add_argument("directory", metavar="DIRECTORY")
    new = commands.add_parser("new", help="write a commented recipe", description="Writes a commented recipe.")
    new.set_defaults(run=_new)
    new.add_argument("recipe", metavar="RECIPE.toml")
    return parser


def _add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train the student of a recipe, or in stages, of several",
        description="Trains the student of a recipe. Several recipes are stages, trained one after another: a later "
        "one may start from the model of an earlier one ([student] path). A finished stage is skipped and a begun one "
        "resumed, with --resume or without.",
        epilog=f"{EXAMPLES}\n{_keys()}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_train)
    command.add_argument("recipes", metavar="RECIPE.toml", nargs="+")
    _add_set(command)
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in the run's directory, or from the beginning where there is none",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and the plan, train nothing"
    )
    command.add_argument("--save", metavar="FILE", type=Path, help="with --dry-run: a new file for what is printed")


def _add_set(command) -> None:
    command.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="overrides a key of the recipe, in stages of each; may be repeated",
    )


def _add_plan(commands) -> None:
    command = commands.add_parser(
        "plan",
        help="what a recipe takes of a machine with GPUs: memory, seconds",
        description="Says what a recipe takes of a machine other than this one: memory of a GPU and seconds of a step, "
        "both itemised, and what to change where it does not fit. Needs no GPU, and no weights and no data where the "
        "models' configurations lie beside the recipe (models/NAME.json).",
    )
    command.set_defaults(run=_plan)
    command.add_argument("recipe", metavar="RECIPE.toml")
    _add_set(command)
    command.add_argument("--gpu", metavar="NAME", default="a100-80g", help="what kind they are (default: %(default)s)")
    command.add_argument("--gpus", metavar="N", type=_count, default=1, help="how many (default: %(default)s)")
    command.add_argument("--save", metavar="FILE", type=Path, help="a new file for what is printed")


def _count(text: str) -> int:
    """An integer >= 1. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 999999, got {text!r}")
    return int(text)


def _add_eval(commands) -> None:
    command = commands.add_parser(
        "eval",
        help="how often a model's answers are right",
        description="Answers the prompts of a JSON lines file greedily and counts the right answers; by default as in "
        "GSM8K, where a line has a question and an answer whose number follows ####. Or runs tasks of "
        "lm-evaluation-harness. Under torchrun, the processes share the prompts.",
    )
    command.set_defaults(run=_eval)
    add = command.add_argument
    add("model", metavar="MODEL", help="directory or hub name: a model, or an adapter on one")
    add("data", metavar="DATA.jsonl", nargs="?", help="one JSON object a line")
    add("--prompt", type=_text, help="template over a line's fields, where \\n is a line break "
        f"(default: {PROMPT!r})")  # fmt: skip
    add("--response", type=_text, help=f"template of the text that has the right answer (default: {RESPONSE!r})")
    add("--messages", metavar="FIELD", help="in place of both: the field that holds a conversation, a list of "
        "{role, content}, for the tokenizer's chat template; the last answer is the right one")  # fmt: skip
    add("--answer", metavar="REGEX", default=ANSWER, help="its one group is the answer; the last match counts, and "
        "1,450 is 1450 (default: %(default)s)")  # fmt: skip
    add("--limit", metavar="N", type=_count, help="only the first N problems; of each task with --lm-eval")
    add("--batch-size", metavar="N", type=_count, default=32, help="prompts at a time (default: %(default)s)")
    add("--max-new-tokens", metavar="N", type=_count, default=512, help="of a response (default: %(default)s)")
    add("--max-prompt-tokens", metavar="N", type=_count, default=1024, help="problems with longer prompts are left "
        "out and counted (default: %(default)s)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--output", metavar="FILE", default="kdkernels-eval.jsonl", help="where the records go: a line a problem with "
        "its response; of --lm-eval, one JSON object of all results (default: %(default)s)")  # fmt: skip
    add("--lm-eval", metavar="TASKS", nargs="?", const="tsd-kd", help="instead of DATA.jsonl: tasks of "
        "lm-evaluation-harness (kdkernels[lm-eval]) with commas between them, or tsd-kd (the default) or vcrd-code, "
        "those of the papers")  # fmt: skip
    add("--chat", action="store_true", help="with --lm-eval: prompts through the tokenizer's chat template")
    add("--run-code", action="store_true", help="with --lm-eval: allows tasks that run the code which the model writes")


def _text(text: str) -> str:
    """What a shell hands on, with line breaks for \\n."""
    return text.replace("\\n", "\n")


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="compare runs",
        description="Compares runs, ended or not: losses, entropies, lengths, evaluations, seconds by phase, and the "
        "settings that differ. Prints Markdown, and writes it with a figure.",
    )
    command.set_defaults(run=_report)
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


def _keys() -> str:
    """The keys of a recipe, a section a line."""
    lines = ["keys of a recipe (docs/RECIPES.md says what each means):"]
    lines.append("  extends: another recipe; it stands above all sections")
    for section in fields(Config):
        names = [entry.name for entry in fields(section_class(section.type))]
        names = [name if name != "options" else "the options of that objective" for name in names]
        lines.append(
            textwrap.fill(", ".join(names), 100, initial_indent=f"  [{section.name}] ", subsequent_indent=" " * 6)
        )
    return "\n".join(lines) + "\n"
