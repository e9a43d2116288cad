"""Recipes: one TOML file each, read into a `Config`.

    config = load_config("recipes/gsm8k-small.toml", overrides=["train.steps=10"])

Whatever is wrong with a recipe (a key nobody knows, a value of the wrong type, a model directory or data file that is
not there) is found here, before any model is loaded, and told as one `InputError` naming the file, the key, what was
expected and what came. Relative paths start at the current directory, a `~` in front is the home directory.
`extends` (extends.py) names another recipe, from the recipe's own directory, over which this one is laid.

Reading has two parts: `read_recipe` checks names, types and files, and needs neither torch nor DeepSpeed; `complete`
makes the objective, which imports torch, checks the values of its options and fills in what follows from it.
"""

import inspect
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import TEACHERS, Config, ObjectiveConfig, TeacherConfig
from kdkernels.training.recipe.elsewhere import described
from kdkernels.training.recipe.extends import CURATION, EXTENDS, STAGES, lineage, read_tables, set_keys
from kdkernels.training.recipe.resolve import check_paths, resolve, resolve_objective
from kdkernels.training.recipe.schema import parse_section, parse_table, refuse_unknown, show
from kdkernels.training.recipe.signatures import known_objectives, objective_options


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The recipe at `path` with each override `section.key=value` laid over it, checked, every default filled in.

    An override's value is read as TOML; what is no TOML value is taken as a string.

    Raises:
        InputError: the recipe cannot be used.
    """
    return complete(read_recipe(path, overrides), str(path))


def read_recipe(
    path: str | Path, overrides: Iterable[str] = (), coming: Collection[str] = (), dry_run: bool = False
) -> Config:
    """As `load_config`, but for the values of the objective's options and the defaults that follow from it.

    `coming`: real paths of models that may be missing, as they are made before the recipe runs. `dry_run`: all files
    may be missing where the models that are not on this machine are described beside the recipe (elsewhere.py).

    Raises:
        InputError: the recipe cannot be used.
    """
    config = parse_recipe(path, overrides)
    with naming(str(path)):
        if not (dry_run and described(config, lineage(path))):
            check_paths(config, coming)
    return config


def parse_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """As `read_recipe`, but for whether there is anything where it says that something lies."""
    tables = read_tables(path)
    set_keys(tables, overrides)
    tables.pop(CURATION, None)
    if STAGES in tables:
        raise InputError(f"{path}: expected a recipe of one training, got one with [[{STAGES}]]: run_stages trains it")
    return parse_tables(tables, str(path))


def parse_tables(tables: Mapping[str, Any], source: str) -> Config:
    """The recipe of the tables, resolved; `source` is what errors name. Raises InputError."""
    known = {section.name: section for section in fields(Config)}
    refuse_unknown(tables, [*known, EXTENDS], f"{source}:", "section")
    sections = {}
    for name, section in known.items():
        if name in tables:
            if not isinstance(tables[name], Mapping):
                raise InputError(f"{source}: [{name}] expected a table, got {show(tables[name])}")
            if name == TEACHERS:
                sections[name] = _parse_teachers(tables[name], source)
                continue
            kind = section_class(section.type)
            parse = _parse_objective if kind is ObjectiveConfig else parse_section
            sections[name] = parse(kind, tables[name], f"{source}: [{name}]")
        elif section.default is MISSING and name != TEACHERS:
            raise InputError(f"{source}: section [{name}] is missing")
    with naming(source):
        return resolve(Config(**sections))


def complete(config: Config, source: str) -> Config:
    """What `read_recipe` returned, with the values of the objective's options checked and every default filled in.

    Raises:
        InputError: they cannot be used; it names `source`, the recipe.
    """
    with naming(source):
        return resolve_objective(config)


def section_class(kind: Any) -> type:
    """The dataclass of a section whose field in Config has the type `kind`: itself, or itself or None."""
    return next((option for option in (*typing.get_args(kind), kind) if inspect.isclass(option)), kind)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts `source` in front of an InputError's message."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _parse_teachers(tables: Mapping[str, Any], source: str) -> dict[str, TeacherConfig]:
    """The teachers by their names."""
    found = {}
    for name, table in tables.items():
        place = f"{source}: [{TEACHERS}.{name}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"{place} expected a name of letters, digits, - and _")
        if not isinstance(table, Mapping):
            raise InputError(f"{place} expected a table, got {show(table)}")
        found[name] = parse_section(TeacherConfig, table, place)
    return found


def _parse_objective(kind: type, table: Mapping[str, Any], place: str) -> ObjectiveConfig:
    """The objective with the names and types of its options checked, and its constructor's defaults filled in."""
    named = {key: value for key, value in table.items() if key == "name"}
    name = parse_table(named, {"name": (Literal[known_objectives()], MISSING)}, place)["name"]
    options = parse_table(table, {"name": (str, MISSING)} | objective_options(name), place)
    del options["name"]
    return kind(name=name, options=options)
