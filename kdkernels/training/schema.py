"""TOML tables against annotated dataclasses: every value has the type its field declares, or an InputError says what
was expected and what came.
"""

import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


class InputError(ValueError):
    """What the user gave (a recipe, a data file, a run directory) cannot be used; the message says where, what was
    expected, what came.
    """


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type: the second argument of an `Annotated`."""

    holds: Callable[[Any], bool]
    expected: str


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, not UTF-8
        raise InputError(f"{path}: not a TOML file: {error}") from error


def override(tables: dict[str, Any], assignment: str) -> None:
    """Lays `section.key=value` over `tables`. The value is read as TOML; what is no TOML value is taken as a string.
    Raises InputError.
    """
    path, equals, text = assignment.partition("=")
    *parents, key = (part.strip() for part in path.split("."))
    if not equals or not parents or not key:
        raise InputError(f"--set {assignment}: expected section.key=value")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise InputError(f"--set {assignment}: {parent!r} is not a table")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    tables[key] = parsed["value"] if parsed.keys() == {"value"} else text


def refuse_unknown(given: Iterable[str], known: Iterable[str], place: str, what: str) -> None:
    """Raises InputError for the first of the `given` names that is not `known`, with the closest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {closest[0]!r}?" if closest else f"expected one of {', '.join(known)}"
            raise InputError(f"{place} unknown {what} {name!r}; {hint}")


def parse_table(table: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]], place: str) -> dict[str, Any]:
    """The values of `table`, checked, with defaults filled in. `known`: key -> (type, default or MISSING). Raises
    InputError.
    """
    refuse_unknown(table, known, place, "key")
    values = {}
    for key, (kind, default) in known.items():
        if key in table:
            values[key] = parse_value(table[key], kind, f"{place} {key}")
        elif default is MISSING:
            raise InputError(f"{place} key {key!r} is missing; expected {describe(kind)}")
        else:
            values[key] = default
    return values


NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a table"}
UNIONS = (types.UnionType, typing.Union)


def describe(kind: Any) -> str:
    """What a value of the type `kind` looks like in TOML, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return kind.__metadata__[0].expected
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        items = "values" if args[-1] is Ellipsis else f"{len(args)} values"
        return f"an array of {items}, each {describe(args[0])}"
    if origin in UNIONS:
        return describe(_in_toml(args))
    return NAMES[kind]


def parse_value(value: Any, kind: Any, place: str) -> Any:
    """`value` as the type `kind`. An integer is a number too; nothing else is converted. Raises InputError, whose
    message starts with `place`.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return parse_value(value, _in_toml(args), place)
    if origin is Annotated:
        if _fits(value, args[0]) and kind.__metadata__[0].holds(value):
            return parse_value(value, args[0], place)
    elif origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, list) else args
        if isinstance(value, list) and len(value) == len(kinds):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(parse_value(item, one, f"{place}[{i}]") for i, (item, one) in pairs)
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif _fits(value, kind):
        return kind(value)
    raise InputError(f"{place}: expected {describe(kind)}, got {value!r}")


def _in_toml(options: tuple) -> Any:
    """The option of a union that TOML can say: the first, None being a missing key."""
    return next(option for option in options if option is not types.NoneType)


def _fits(value: Any, kind: type) -> bool:
    return type(value) in (int, float) if kind is float else type(value) is kind


def to_tables(config: Any) -> dict[str, dict[str, Any]]:
    """The TOML tables of a dataclass of dataclasses; None is left out, an `options` mapping stands among its section's
    own keys.
    """
    tables = {}
    for section in fields(config):
        values = getattr(config, section.name)
        if values is not None:
            table = {entry.name: getattr(values, entry.name) for entry in fields(values)}
            table |= table.pop("options", {})
            tables[section.name] = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in table.items()
                if value is not None
            }
    return tables


def to_toml(config: Any) -> str:
    """The TOML text of a dataclass of dataclasses."""
    lines = []
    for section, table in to_tables(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)
