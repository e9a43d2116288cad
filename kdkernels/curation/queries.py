"""The queries of a recipe, each once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdkernels.curation.config import CurationConfig
from kdkernels.data.records import hash_of_rows, is_dataset
from kdkernels.data.texts import render
from kdkernels.errors import InputError
from kdkernels.training.run.hashes import sha256_of_all

KEYS = ("[curation] query", "[curation] label")


@dataclass(frozen=True)
class Query:
    """A query with the line that has it first, and the others that have it too. `right`: the right answer, "" where the
    recipe names none.
    """

    line: int
    text: str
    right: str
    duplicates: tuple[int, ...] = ()


def read_queries(config: CurationConfig) -> list[Query]:
    """The queries in the order of the file; of those that say the same, the first, with the lines of the others.

    Raises:
        InputError: a line without a query, none at all, and two lines of one query with different right answers.
    """
    found: dict[str, Query] = {}
    for line, text, right in render(config.queries, config.query, config.label, keys=KEYS):
        place = f"{config.queries}, line {line}"
        if not text.strip():
            raise InputError(f"{place}: [curation] query: expected a text, got {text!r}")
        first = found.setdefault(text, Query(line, text, right))
        if first.right != right:
            raise InputError(f"{place}: the query is that of line {first.line}, whose label is {first.right!r}")
        if first.line != line:
            found[text] = Query(first.line, text, right, (*first.duplicates, line))
    if not found:
        raise InputError(f"[curation] queries: {config.queries} has no line")
    return list(found.values())


def identity(path: str) -> str:
    """The SHA-256 of the file or of the dataset's rows."""
    return hash_of_rows(path) if is_dataset(path) else sha256_of_all([Path(path)])[0]


def conversation(prompt: str) -> list[Mapping[str, str]]:
    """What a teacher is sent: all in one message, as some chat templates know no other."""
    return [{"role": "user", "content": prompt}]
