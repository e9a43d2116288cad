"""Where data lie: JSON lines, or a dataset of Hugging Face in a directory or on its hub. One record after another.

data/train.jsonl          one JSON object a line
data/train.parquet        or a directory of such files
data/saved/train          what `Dataset.save_to_disk` wrote
hf:openai/gsm8k:main:train    a dataset of the hub, its configuration and its split; hf:NAME:SPLIT and hf:NAME (its
                              "train") where it has one configuration
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError, MissingPackage

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DIGITS = 4000  # of an integer; Python itself refuses more than 4300
IN_JSON = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
HUB, PARQUET = "hf:", ".parquet"


def records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of every line or row at `path`, from 1.

    A byte order mark before a file's first line and blank lines after its last one are no part of the data.

    Raises:
        InputError: naming file and line, for a blank line between others and a line that is no JSON object; for what is
            no dataset.
        MissingPackage: a dataset without the package `datasets`.
    """
    if is_dataset(path):
        yield from enumerate(_dataset(path), start=1)
        return
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
            yield number, _parse(line.rstrip(b"\r\n"), f"{path}, line {number}")


def is_dataset(path: str) -> bool:
    """Whether `path` is read by `datasets`, not as JSON lines."""
    return path.startswith(HUB) or path.endswith(PARQUET) or os.path.isdir(path)


def hash_of_rows(path: str) -> str:
    """The SHA-256 of all rows of the dataset at `path`. Raises as `records`."""
    digest = hashlib.sha256()
    for _, record in records(path):
        digest.update(json.dumps(record, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _dataset(path: str):
    """The dataset of `datasets` at `path`."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingPackage(f"the data at {path} need datasets: pip install kdkernels[datasets]") from error
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        splits = sorted(str(file.parent) for file in Path(path).glob("*/dataset_info.json"))
        raise InputError(f"{path}: expected one of the splits of this dataset: {', '.join(splits)}")
    try:
        if path.startswith(HUB):
            return _of_hub(datasets, path)
        if os.path.isfile(os.path.join(path, "dataset_info.json")):
            return datasets.load_from_disk(path)
        files = sorted(map(str, Path(path).glob(f"*{PARQUET}"))) if os.path.isdir(path) else [path]
        if not files:
            raise InputError(f"{path}: expected a dataset saved by save_to_disk, or files *{PARQUET}, got neither")
        return datasets.Dataset.from_parquet(files)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path} cannot be read as a dataset: {error}") from error


def _of_hub(datasets, path: str):
    name, *rest = path.removeprefix(HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise InputError(f"{path}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT")
    return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train")


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
