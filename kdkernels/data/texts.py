"""Prompts and responses from records, by the recipe's templates. What is no text is refused, with its line.

A field holds a text, or a number, which is written as the file writes it (1.50 stays 1.50). Fields that no template
uses may hold anything.
"""

import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kdkernels.data.records import IN_JSON, records
from kdkernels.errors import InputError


def render(
    path: str,
    prompt: str,
    response: str | None,
    special_tokens: Iterable[str] = (),
    keys: tuple[str, str] = ("[data] prompt", "[data] response"),
) -> Iterator[tuple[int, str, str]]:
    """(line number, prompt, response) of every record at `path` (records.py).

    Args:
        path: of JSON lines or of a dataset.
        prompt, response: templates over the fields of a record; a response of None is an empty text.
        special_tokens: may stand in a template but not in a field, where they are data that would be read as an
            instruction.
        keys: what errors call the two templates.

    Raises:
        InputError: naming file and line, for what `records` refuses, and fields that a template has no use for.
    """
    templates = [_Template(prompt, keys[0], path), _Template(response or "", keys[1], path)]
    special = any_of(special_tokens)
    for number, record in records(path):
        yield number, *(template.fill(record, number, special) for template in templates)


def any_of(special_tokens: Iterable[str]) -> re.Pattern | None:
    """What finds the first of the texts in another one; None for no texts."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@dataclass(frozen=True)
class Line:
    """What comes of a record: the prompt, the `answer` as the record has it, and the response that a model learns.
    `closed`: a special token ends the response.
    """

    number: int
    prompt: str
    answer: str
    response: str
    closed: bool


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
            raise InputError(f"{key}: not a template: {error}: {template!r}") from error
        self.pieces = []
        for text, name, form, conversion in parsed:
            if text:
                self.pieces.append(_Piece(text, None))
            if name is None:
                continue
            if not name.isidentifier():
                raise InputError(
                    f"{key}: expected field names in braces (literal braces doubled), got {{{name}}} in {template!r}"
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
                f"{place}: field {piece.field!r} of {self.key} is missing; the line has {', '.join(record)}"
            )
        value = record[piece.field]
        if type(value) in IN_JSON or not isinstance(value, (str, int, float)):
            raise InputError(
                f"{place}: field {piece.field!r} of {self.key}: expected a text or a number, got "
                f"{IN_JSON.get(type(value), type(value).__name__)}"
            )
        try:
            text = piece.text.format_map(record)
        except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:  # a format it does not have
            said = str(error) or "the text would be longer than memory"
            raise InputError(f"{place}: {self.key}: {self.template!r} cannot be filled in: {said}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: field {piece.field!r} of {self.key}: expected a text, got half a surrogate pair, "
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
                        f"{self.path}, line {line}: field {piece.field!r} of {self.key} has {found[0]!r} in it, "
                        "which the tokenizer reads as a special token: take it out, or, where the fields are written "
                        "with such tokens on purpose (rendered chat templates), set special_tokens_in_fields = true "
                        "in [data]"
                    )
                start = end
