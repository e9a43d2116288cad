"""The directory of a curation.

manifest.json    what the dataset is made from and by which settings; at the end also the hashes of the other files
answers.jsonl    all answers as they came (journal.py), unless [curation] answers names another file
dataset.jsonl    what was kept: what `kdkernels train` reads
decisions.jsonl  of every query and teacher, what became of the answer, and why
failures.jsonl   the answers that could not be read, and those that did not come
report.md        the counts of all this, and what it cost
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdkernels.data.jsonl import json_line
from kdkernels.errors import InputError
from kdkernels.training.recipe.schema import show
from kdkernels.training.run import lock
from kdkernels.training.run.atomic import UNFINISHED, remove_unfinished, write_text, writing
from kdkernels.training.run.hashes import HashedFile

MANIFEST, ANSWERS, DATASET = "manifest.json", "answers.jsonl", "dataset.jsonl"
DECISIONS, FAILURES, REPORT = "decisions.jsonl", "failures.jsonl", "report.md"
KEY = "[curation] output"


class Lines:
    """JSON lines that are there completely or not at all: to be used as a context, which ends with the whole file."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._unfinished = path.with_name(UNFINISHED + path.name)

    def __enter__(self) -> "Lines":
        with writing(self.path):
            self._raw = self._unfinished.open("wb")
        self._file = HashedFile(self._raw)
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a line. Raises DiskError."""
        with writing(self.path):
            self._file.write(json_line(record).encode())
        self.count += 1

    def __exit__(self, kind, error, trace) -> None:
        with writing(self.path), self._raw:
            if kind is None:
                self._raw.flush()
                os.fsync(self._raw.fileno())
                self._unfinished.replace(self.path)

    def result(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        return {"sha256": self._file.hexdigest(), "lines": self.count}


@contextmanager
def opened(root: Path, made_from: Mapping[str, Any]) -> Iterator[None]:
    """The directory `root`, for this process alone, as that of a curation that is made from just this; the manifest
    says so from the beginning. Raises InputError where it is another's, naming what differs.
    """
    _check(root, made_from)
    with lock.locked(root, KEY):
        _check(root, made_from)
        remove_unfinished(root)
        if not (root / MANIFEST).exists():
            write_manifest(root, made_from)
        yield


def write_manifest(root: Path, made_from: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> None:
    """Raises DiskError."""
    contents = dict(made_from) | ({"results": results} if results else {})
    write_text(root / MANIFEST, json.dumps(contents, indent=1) + "\n")


def _check(root: Path, made_from: Mapping[str, Any]) -> None:
    manifest = root / MANIFEST
    try:
        there = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
        others = [path.name for path in root.iterdir()] if root.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{KEY}: {manifest} cannot be read: {error}: give another directory") from error
    if there is None:
        if any(name != lock.NAME and not name.startswith(UNFINISHED) for name in others):
            raise InputError(f"{KEY}: {root} holds something that is no curation: give another directory")
        return
    wanted = json.loads(json.dumps(made_from))
    changes = [
        f"{group} {name}: {_shown(there, group, name)} there, {_shown(wanted, group, name)} now"
        for group in wanted
        for name in {**_part(there, group), **wanted[group]}
        if _part(there, group).get(name) != wanted[group].get(name)
    ]
    if changes:
        raise InputError(
            f"{KEY}: {root} is that of another curation: {'; '.join(changes)}. Give another directory, and with "
            f"answers = {str(root / ANSWERS)!r} what was answered there is not asked for again"
        )


def _part(manifest: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    part = manifest.get(group) if isinstance(manifest, dict) else None
    return part if isinstance(part, dict) else {}


def _shown(manifest: Mapping[str, Any], group: str, name: str) -> str:
    return show(_part(manifest, group).get(name))
