"""Prompts and responses from JSON lines, by the recipe's templates. What is no text is refused, with its line.

A field holds a text, or a number, which is written as the file writes it (1.50 stays 1.50). Fields that no template
uses may hold anything.
"""

import json
import math
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DIGITS = 4000  # of an integer; Python itself refuses more than 4300
IN_JSON = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}


def render(
    path: str, prompt: str, response: str | None, special_tokens: Iterable[str] = ()
) -> Iterator[tuple[int, str, str]]:
    """(line number, prompt, response) of every line of the JSON lines file at `path`.

    A byte order mark before the first line and blank lines after the last one are no part of the data.

    Args:
        path: one JSON object a line.
        prompt, response: templates over the fields of a line; a response of None is an empty text.
        special_tokens: may stand in a template but not in a field, where they are data that would be read as an
            instruction.

    Raises:
        InputError: naming file and line, for a blank line between others, a line that is no JSON object, and fields
            that a template has no use for.
    """
    templates = [_Template(prompt, "prompt", path), _Template(response or "", "response", path)]
    special = None
    if special_tokens:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, longest_first)))
    blank = None
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise InputError(f"{path}, line {blank}: expected a JSON object, got a blank line between others")
            record = _parse(line.rstrip(b"\r\n"), f"{path}, line {number}")
            yield number, *(template.fill(record, number, special) for template in templates)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object in `line`."""
    try:
        record = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_Decimal,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        byte, column = line[error.start], error.start + 1
        raise InputError(
            f"{place}: expected a JSON object: expected UTF-8, got byte 0x{byte:02x} at column {column}"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: expected a JSON object: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise InputError(f"{place}: expected a JSON object: lists or objects too deep within each other") from error
    except ValueError as error:  # of the four functions above
        raise InputError(f"{place}: expected a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, got {IN_JSON.get(type(record), type(record).__name__)}")
    return record


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return record


def _integer(digits: str) -> float:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; expected at most {DIGITS}, or a text")
    return _Decimal(digits) if digits == "-0" else int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _Decimal(float):
    """A number with a fraction or an exponent that is written as the file writes it, unless a template formats it."""

    def __new__(cls, written: str):
        number = super().__new__(cls, written)
        if not math.isfinite(number):
            raise ValueError(f"{written} is too large for a number; expected a text")
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written

    def __format__(self, form: str) -> str:
        return super().__format__(form) if form else self.written

    __repr__ = __str__


@dataclass(frozen=True)
class _Piece:
    """A part of a template: text of its own (`field` is None) or a field in braces."""

    text: str
    field: str | None


class _Template:
    """A text with fields in braces. Raises InputError for what is none."""

    def __init__(self, template: str, key: str, path: str):
        self.template, self.key, self.path = template, key, path
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise InputError(f"[data] {key}: not a template: {error}: {template!r}") from error
        self.pieces = []
        for text, name, form, conversion in parsed:
            if text:
                self.pieces.append(_Piece(text, None))
            if name is None:
                continue
            if not name.isidentifier():
                raise InputError(
                    f"[data] {key}: expected field names in braces (literal braces doubled), got {{{name}}} in "
                    f"{template!r}"
                )
            braces = "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
            self.pieces.append(_Piece(braces, name))

    def fill(self, record: dict[str, Any], line: int, special: re.Pattern | None) -> str:
        """The text for the `record` of a line."""
        parts = [piece.text if piece.field is None else self._value(piece, record, line) for piece in self.pieces]
        text = "".join(parts)
        if special is not None:
            self._refuse_special(text, parts, line, special)
        return text

    def _value(self, piece: _Piece, record: dict[str, Any], line: int) -> str:
        place = f"{self.path}, line {line}"
        if piece.field not in record:
            raise InputError(
                f"{place}: field {piece.field!r} of [data] {self.key} is missing; the line has {', '.join(record)}"
            )
        value = record[piece.field]
        if type(value) in IN_JSON:
            raise InputError(
                f"{place}: field {piece.field!r} of [data] {self.key}: expected a text or a number, got "
                f"{IN_JSON[type(value)]}"
            )
        try:
            text = piece.text.format_map(record)
        except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:  # a format it does not have
            said = str(error) or "the text would be longer than memory"
            raise InputError(f"{place}: [data] {self.key}: {self.template!r} cannot be filled in: {said}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: field {piece.field!r} of [data] {self.key}: expected a text, got half a surrogate pair, "
                f"\\u{ord(text[error.start]):04x}, at character {error.start + 1}"
            ) from error
        return text

    def _refuse_special(self, text: str, parts: list[str], line: int, special: re.Pattern) -> None:
        """Refuses a special token of which any character comes from a field."""
        for found in special.finditer(text):
            start = 0
            for piece, part in zip(self.pieces, parts, strict=True):
                end = start + len(part)
                if piece.field is not None and start < found.end() and found.start() < end:
                    raise InputError(
                        f"{self.path}, line {line}: field {piece.field!r} of [data] {self.key} has {found[0]!r} in it, "
                        "which the tokenizer reads as a special token: take it out, or, where the fields are written "
                        "with such tokens on purpose (rendered chat templates), set special_tokens_in_fields = true "
                        "in [data]"
                    )
                start = end
