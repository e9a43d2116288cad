"""All answers that were ever given, one JSON object a line, each under a hash of all that it depends on.

A line is written at once and flushed to the disk before anybody hears of its answers. A process that is killed leaves
at most a part of the last line, which is cut off when the file is opened again. Lines are never changed: of two about
the same question the later one counts.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdkernels.curation.chat import Answer, Conversation, Failure
from kdkernels.errors import InputError
from kdkernels.training.run.atomic import append, writing

NUMBER = (int, type(None))
ANSWERED = {
    "text": (str,),
    "tokens_in": NUMBER,
    "tokens_out": NUMBER,
    "logprob": (float, *NUMBER),
    "truncated": (bool,),
}
FAILED = {"failure": (str,), "message": (str,), "final": (bool,)}
BEGINNING = b'{"answers": ['  # of every line


def address(teacher: str, identity: Mapping[str, Any], conversation: Conversation) -> str:
    """Under what an answer is kept: 32 hex digits, a hash of who was asked and what."""
    asked = [teacher, dict(identity), [dict(message) for message in conversation]]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """The answers in the file `path`, which is made if it is not there. One process has it at a time.

    Raises InputError where another process has it, and for a file that is no such journal.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._at: dict[str, int] = {}  # where the line of each address starts
        self._open: set[str] = set()  # the addresses that may be asked for again
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_all()
        except BlockingIOError as error:
            self._file.close()
            raise InputError(
                f"[curation] answers: another run has {path}: wait for its end, or give another file"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def put(self, found: Sequence[tuple[str, str, Answer | Failure]]) -> None:
        """Keeps what came of some questions: for each its address, the teacher's name and the answer. Raises
        DiskError.
        """
        line = json.dumps({"answers": [{"address": a, "teacher": t, **_record(one)} for a, t, one in found]})
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            try:
                append(self._file, line.encode() + b"\n")
                with writing(self.path):
                    os.fsync(self._file.fileno())
            except BaseException:
                with suppress(OSError):
                    self._file.truncate(start)  # or the next line would be written behind half of this one
                raise
            for where, _, one in found:
                self._note(where, start, isinstance(one, Failure) and not one.final)

    def has(self, where: str) -> bool:
        """Whether what is at the address is not to be asked for again."""
        return where in self._at and where not in self._open

    def get(self, where: str) -> Answer | Failure | None:
        """What is at the address; None where there is nothing."""
        if where not in self._at:
            return None
        with self.path.open("rb") as lines:
            lines.seek(self._at[where])
            line = lines.readline()
        return next(_read(one) for one in reversed(json.loads(line)["answers"]) if one["address"] == where)

    def close(self) -> None:
        """Lets other processes have the file."""
        self._file.close()

    def _note(self, where: str, start: int, is_open: bool) -> None:
        self._at[where] = start
        (self._open.add if is_open else self._open.discard)(where)

    def _read_all(self) -> None:
        """Finds every address. What a kill left of a last line is cut off."""
        start = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                cut = not line.endswith(b"\n")
                if cut and line[: len(BEGINNING)] == BEGINNING[: len(line)]:
                    with writing(self.path):
                        self._file.truncate(start)
                    return
                try:
                    if cut:
                        raise ValueError("no line of a journal")
                    for one in json.loads(line)["answers"]:
                        found = _read(one)
                        self._note(one["address"], start, isinstance(found, Failure) and not found.final)
                except (ValueError, LookupError, TypeError) as error:
                    raise InputError(
                        f"[curation] answers: {self.path}, line {number} is damaged, or the file is no journal of "
                        "answers: put the file back, or give another one"
                    ) from error
                start += len(line)


def _record(found: Answer | Failure) -> dict[str, Any]:
    faults = list(found.faults)
    if isinstance(found, Failure):
        return {"failure": found.kind, "message": str(found), "final": found.final, "faults": faults}
    return {
        "text": found.text,
        "tokens_in": found.tokens_in,
        "tokens_out": found.tokens_out,
        "logprob": found.logprob,
        "truncated": found.truncated,
        "faults": faults,
    }


def _read(record: Mapping[str, Any]) -> Answer | Failure:
    """Raises LookupError and TypeError for what `_record` did not make."""
    for key, kinds in (FAILED if "failure" in record else ANSWERED).items():
        if type(record[key]) not in kinds:
            raise TypeError(key)
    faults = tuple(record["faults"])
    if "failure" in record:
        return Failure(record["failure"], record["message"], final=record["final"], faults=faults)
    return Answer(**{key: record[key] for key in ANSWERED}, faults=faults)
