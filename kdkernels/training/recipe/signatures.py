"""The objectives' names and options, read from their source files: a recipe is checked without importing torch."""

import ast
import builtins
import typing
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "objectives"


def known_objectives() -> tuple[str, ...]:
    """The names that [objective] may have: the objectives that the package exports, in that order."""
    return tuple(name for name in _exported(FOLDER) if _is_objective(name))


def objective_options(name: str) -> dict[str, tuple[Any, Any]]:
    """The arguments of an objective's constructor: name -> (type, default or MISSING)."""
    constructor = _constructor(name)
    if constructor is None:
        return {}
    arguments = constructor.args
    positional = arguments.args[1:]  # without self
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    options = {}
    for argument, default in zip(positional + arguments.kwonlyargs, defaults + arguments.kw_defaults, strict=True):
        kind = eval(ast.unparse(argument.annotation), {}, _Types())
        options[argument.arg] = kind, MISSING if default is None else ast.literal_eval(default)
    return options


class _Types(dict):
    """What the names in annotations mean: Python's own types, and `object` for any other, which no recipe can say."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or getattr(typing, name, object)


@cache
def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def _exported(folder: Path) -> list[str]:
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise LookupError(f"{folder / '__init__.py'}: expected a list __all__, found none")


def _bases(name: str) -> list[str]:
    known = _classes(FOLDER)
    return [ast.unparse(base) for base in known[name].bases] if name in known else []


def _is_objective(name: str) -> bool:
    """Whether a class inherits from `Objective`, directly or through others."""
    return any(base == "Objective" or _is_objective(base) for base in _bases(name))


def _constructor(name: str) -> ast.FunctionDef | None:
    """The `__init__` of a class or of the nearest base here that has one; None where only torch's is left."""
    known = _classes(FOLDER)
    for node in known[name].body if name in known else ():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node
    return next(filter(None, map(_constructor, _bases(name))), None)
