"""TOML tables against annotated dataclasses: every value has the type its field declares, or an InputError says what
was expected and what came.
"""

import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from kdkernels.errors import InputError, MissingPackage


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type: the second argument of an `Annotated`."""

    holds: Callable[[Any], bool]
    expected: str


def toml() -> types.ModuleType:
    """Python's TOML parser, which 3.10 does not have: there tomli, where it is installed. Raises MissingPackage."""
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise MissingPackage("recipes need tomli on Python 3.10: pip install kdkernels[train]") from error
    return tomllib


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError."""
    try:
        return toml().loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, not UTF-8
        raise InputError(f"{path}: not a TOML file: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not a TOML file that can be read: arrays or tables nested too deeply") from error


def override(tables: dict[str, Any], assignment: str, instead: Mapping[str, Sequence[str]] | None = None) -> None:
    """Lays `section.key=value` over `tables`. The value is read as TOML; what is no TOML value is taken as a string.
    `instead`: of a `section.key` the keys of that section that it takes the place of. Raises InputError.
    """
    path, equals, text = assignment.partition("=")
    *parents, key = (part.strip() for part in path.split("."))
    if not equals or not parents or not key:
        raise InputError(f"--set {assignment}: expected section.key=value")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise InputError(f"--set {assignment}: {parent!r} is not a table")
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python hands on bytes that are not UTF-8
        raise InputError(f"--set {path}: expected UTF-8, got {text!r}")
    try:
        parsed = toml().loads(f"value = {text}")
    except toml().TOMLDecodeError:
        parsed = {}
    except RecursionError as error:
        raise InputError(f"--set {path}: arrays or tables nested too deeply") from error
    except ValueError as error:  # TOML, but no value of Python: a number of thousands of digits
        raise InputError(f"--set {path}: {error}") from error
    tables[key] = parsed["value"] if parsed.keys() == {"value"} else text
    for replaced in (instead or {}).get(".".join([*parents, key]), ()):
        tables.pop(replaced, None)


def refuse_unknown(given: Iterable[str], known: Iterable[str], place: str, what: str) -> None:
    """Raises InputError for the first of the `given` names that is not `known`, with the closest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            few = (
                f"expected one of {', '.join(known)}"
                if len(known) <= 50
                else f"none of the {len(known)} known is close"
            )
            hint = f"did you mean {closest[0]!r}?" if closest else few
            raise InputError(f"{place} unknown {what} {show(name)}; {hint}")


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


def parse_section(kind: type, table: Mapping[str, Any], place: str) -> Any:
    """The dataclass `kind` with the values of `table`. Raises InputError."""
    return kind(**parse_table(table, {entry.name: (entry.type, entry.default) for entry in fields(kind)}, place))


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
    return NAMES[dict if is_dataclass(kind) else kind]


def parse_value(value: Any, kind: Any, place: str) -> Any:
    """`value` as the type `kind`. An integer is a number too; nothing else is converted. Raises InputError, whose
    message starts with `place`.
    """
    if type(value) is int and not _has_64_bits(value):
        raise InputError(f"{place}: expected an integer of 64 bits, as TOML has them, got {show(value)}")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return parse_value(value, _in_toml(args), place)
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            section, _, key = place.rpartition("] ")
            return parse_section(kind, value, f"{section}.{key}]")
    elif origin is Annotated:
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
        if kind is dict:
            _check_plain(value, place)
        return kind(value)
    raise InputError(f"{place}: expected {describe(kind)}, got {show(value)}")


def _in_toml(options: tuple) -> Any:
    """The option of a union that TOML can say: the first, None being a missing key."""
    return next(option for option in options if option is not types.NoneType)


def _fits(value: Any, kind: type) -> bool:
    return type(value) in (int, float) if kind is float else type(value) is kind


def _has_64_bits(value: int) -> bool:
    """Whether TOML can say the integer; tomllib reads any."""
    return -(2**63) <= value < 2**63


def show(value: Any) -> str:
    """`value` in an error message, at most a line of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"a value of type {type(value).__name__} with too many digits to show"
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_plain(value: Any, place: str) -> None:
    """Refuses what a free table must not hold, at any depth: a run writes it down and compares it when it resumes."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{place}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, f"{place}[{i}]")
    elif not (isinstance(value, (bool, str)) or (_fits(value, int) and _has_64_bits(value)) or _finite(value)):
        raise InputError(f"{place}: expected text, true or false, or a finite number of 64 bits, got {show(value)}")


def _finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def to_tables(config: Any) -> dict[str, dict[str, Any]]:
    """The TOML tables of a dataclass of dataclasses; None is left out, an `options` mapping stands among its section's
    own keys.
    """
    tables = {}
    for section in fields(config):
        values = getattr(config, section.name)
        if isinstance(values, Mapping):
            tables |= {section.name: {name: _to_table(one) for name, one in values.items()}} if values else {}
        elif values is not None:
            table = _to_table(values)
            tables[section.name] = table | table.pop("options", {})
    return tables


def _to_table(values: Any) -> dict[str, Any]:
    found = {entry.name: getattr(values, entry.name) for entry in fields(values)}
    return {
        key: list(value) if isinstance(value, tuple) else _to_table(value) if is_dataclass(value) else value
        for key, value in found.items()
        if value is not None
    }


def to_toml(config: Any) -> str:
    """The TOML text of a dataclass of dataclasses."""
    lines = []
    for section, table in to_tables(config).items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)
