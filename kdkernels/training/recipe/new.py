"""What `kdkernels new` writes: a recipe with every section and key, its meaning beside it."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import TEACHERS, Config
from kdkernels.training.recipe.read import section_class
from kdkernels.training.recipe.schema import describe, toml_value

START = """\
# Distils a teacher into a student. Change the paths and numbers below; lines in comments show the defaults.
# `kdkernels train THIS_FILE --dry-run` checks it all and trains nothing.
# A first line extends = "other.toml" takes over what another recipe, found from this file, says and this one does not.
"""
SET = {  # what a recipe cannot do without, and a start for what most want to change
    "run": {"output": "runs/mine"},
    "student": {"path": "models/student"},
    "teacher": {"path": "models/teacher"},
    "data": {
        "train": "data/train.jsonl",
        "prompt": "{question}\n",
        "response": "{answer}",
        "max_prompt_tokens": 512,
        "max_response_tokens": 512,
    },
    "objective": {"name": "GKD"},
    "optimizer": {"lr": 1e-5},
    "train": {"steps": 1000, "batch_size": 32, "micro_batch_size": 4},
    "evaluation": {"data": "data/test.jsonl", "limit": 200, "metrics": ["cross_entropy", "kl"]},
}
OPTIONS = "# beta, tau, k ...: the options of each objective are in docs/RECIPES.md"


def write_recipe(path: Path) -> None:
    """Writes a commented recipe to `path`.

    Raises:
        InputError: there is something at `path`, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipe_text())
    except FileExistsError as error:
        raise InputError(f"{path}: expected a file that is not there yet, got one: give another name") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def recipe_text() -> str:
    """Every section of `Config` with its docstring as comments; the keys of `SET` are set, all others are comments, and
    so are sections that a recipe may lack and `SET` does.
    """
    blocks = [START]
    for section in fields(Config):
        if section.name == TEACHERS:  # as [teacher]
            continue
        kind = section_class(section.type)
        lines = [f"# {line}".rstrip() for line in inspect.getdoc(kind).splitlines()]
        lines.append(f"{'# ' if section.default is None and section.name not in SET else ''}[{section.name}]")
        for entry in fields(kind):
            if entry.name == "options":
                lines.append(OPTIONS)
            else:
                lines.append(_line(entry, SET.get(section.name, {}).get(entry.name)))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _line(entry, value: object) -> str:
    """`key = value  # what it may be`: set to `value`, or in comments as it is without."""
    if value is None and entry.default in (None, MISSING):
        return f"# {entry.name} =  # {describe(entry.type)}; not set"
    if value is None:
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        return f"# {entry.name} = {toml_value(default)}  # {describe(entry.type)}"
    return f"{entry.name} = {toml_value(value)}  # {describe(entry.type)}"
