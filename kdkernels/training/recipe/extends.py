"""A recipe that extends another: `extends = "other.toml"`, above its first section."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError
from kdkernels.training.recipe.schema import override, read_toml, show

EXTENDS, STAGES = "extends", "stages"
CURATION = "curation"  # a section of other commands (kdkernels.curation)
LENGTH = {"train.steps": ("epochs",), "train.epochs": ("steps",)}
INSTEAD = LENGTH | {  # a key, and those of its section that it takes the place of
    "student.path": ("architecture", "pad_vocab_to"),
    "student.architecture": ("path",),
    "teacher.path": ("base", "url"),
    "teacher.url": ("path", "base"),
    "teacher.base": ("path",),
    "tokenizer.path": ("kind", "vocab_size"),
    "tokenizer.kind": ("path",),
    "judge.path": ("function",),
    "judge.function": ("path",),
    "data.messages": ("prompt", "response"),
    "data.prompt": ("messages", "answers"),
}


def read_tables(path: str | Path) -> dict[str, Any]:
    """The tables of the recipe at `path`, laid key by key over those of the recipe that it extends, if it does.

    The exceptions: an [objective] of another name replaces the section, since the options there are not its own, and
    keys of which a recipe has one, such as steps and epochs, replace each other (INSTEAD).

    Raises:
        InputError: a recipe that cannot be read, or recipes that extend each other in a circle.
    """
    tables = {}
    for _, own in reversed(list(_chain(Path(path)))):
        lay(own, over=tables)
    return tables


def lineage(path: str | Path) -> list[Path]:
    """The recipe at `path`, the one that it extends, the one that that one extends, and so on. Raises InputError."""
    return [file for file, _ in _chain(Path(path))]


def _chain(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each recipe's path and what it says itself."""
    seen = []
    while path is not None:
        tables = read_toml(path)
        seen.append(path)
        base = _base(path, tables.pop(EXTENDS, None))
        if base is not None and base.resolve() in [one.resolve() for one in seen]:
            raise InputError(f"{path}: extends: recipes extend each other in a circle: {_arrows([*seen, base])}")
        yield path, tables
        path = base


def _base(path: Path, name: object) -> Path | None:
    """Where the recipe lies that the one at `path` extends; None where it extends none."""
    if name is None:
        return None
    if type(name) is not str or not name.strip() or "\0" in name:
        raise InputError(f"{path}: extends: expected a path, which is not empty, got {show(name)}")
    try:
        base = path.parent / Path(name).expanduser()
        found = base.is_file()
    except RuntimeError as error:
        raise InputError(f"{path}: extends: no home directory is known for {name}: write it out") from error
    except OSError as error:
        raise InputError(f"{path}: extends: cannot be read: {error.strerror}: {show(name)}") from error
    if not found:
        raise InputError(f"{path}: extends: no such recipe: {base} (a relative path starts where {path.name} is)")
    return base


def _arrows(paths: list[Path]) -> str:
    return " -> ".join(map(str, paths))


def lay(tables: Mapping[str, Any], over: dict[str, Any]) -> None:
    """Lays `tables` over the others, key by key; an [objective] of another name replaces what is there."""
    mine, other = tables.get("objective"), over.get("objective")
    both = isinstance(mine, Mapping) and isinstance(other, Mapping)
    if both and "name" in mine and mine["name"] != other.get("name"):
        del over["objective"]
    for section, table in tables.items():
        if isinstance(table, Mapping) and isinstance(over.get(section), dict):
            for replaced in (one for key in table for one in INSTEAD.get(f"{section}.{key}", ())):
                over[section].pop(replaced, None)
    _merge(tables, over)


def set_keys(tables: dict[str, Any], assignments: Iterable[str]) -> None:
    """Lays every `section.key=value` over `tables`. Raises InputError, also where both of two keys are given of which a
    recipe has one: the order would decide.
    """
    given = set()
    for assignment in assignments:
        override(tables, assignment, LENGTH)
        given.add(assignment.partition("=")[0].replace(" ", ""))
    if given >= LENGTH.keys():
        raise InputError(f"--set: expected one of {' and '.join(LENGTH)}, got both: each takes the other's place")


def _merge(table: Mapping[str, Any], over: dict[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping) and isinstance(over.get(key), dict):
            _merge(value, over[key])
        else:
            over[key] = value
