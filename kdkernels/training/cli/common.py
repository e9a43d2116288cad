"""What several commands share: arguments, and words."""

import argparse
from pathlib import Path

from kdkernels.training.processes.exits import DISK, DONE, end

EXAMPLES = """\
examples:
  kdkernels export runs/mine/checkpoints/step-000050 models/step-50    make a model of a checkpoint
  kdkernels new recipe.toml                             write a recipe with every key explained
  kdkernels train recipe.toml --dry-run                 check everything, show the plan, train nothing
  kdkernels plan recipe.toml --gpu a100-80g --gpus 8    the same for another machine: memory, seconds
  kdkernels train recipe.toml --set train.steps=100     train, with one key of the recipe changed
  kdkernels train recipe.toml --resume                  go on after a crash, bit for bit; begin if there is nothing yet
  kdkernels train recipe.toml --resume --set train.steps=200    more steps than it had, or another [optimizer] lr
  kdkernels train first.toml second.toml                train in stages; the same again goes on after a crash
  kdkernels rollout recipe.toml                         write both models' responses, and a judge's scores, beforehand
  torchrun --nproc-per-node 8 -m kdkernels train recipe.toml
  kdkernels eval runs/a/final gsm8k_test.jsonl         how often a model's answers are right
  kdkernels report runs/a runs/b                        compare runs, in Markdown and a figure
"""


def add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="overrides a key of the recipe, in stages of each; may be repeated",
    )


def add_plan(command: argparse.ArgumentParser, gpu: str | None = None) -> None:
    """What a plan can be asked for; `gpu` by default, None being this machine."""
    add = command.add_argument
    add("--gpu", metavar="NAME", default=gpu, help=f"what kind of GPUs (default: {gpu or 'what this machine has'})")
    add("--gpus", metavar="N", type=count, help="how many, with a process each (default: 1)")
    add("--save", metavar="FILE", type=Path, help="a new file for what is printed")


def count(text: str) -> int:
    """An integer >= 1. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 999999, got {text!r}")
    return int(text)


def show(text: str) -> int:
    """Prints. Returns the exit status."""
    try:
        print(text, flush=True)
    except OSError as error:
        return end(DISK, f"standard output: cannot be written: {error.strerror}")
    return DONE
