"""The data of a stage of compressed rationales, in the directory of its file:

manifest.json     what they are made from and how; other data, models or settings are refused
answers/          what the student of the stage before writes to the training queries
rewritings.jsonl  every reply of a teacher, as it came: none is asked for twice
decisions.jsonl   of each record: its teacher, the student's rationale and what came of it (counts.json: how often)
train.jsonl       the records with the rewritten rationales, complete or not there
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdkernels.compression.requests import Unusable, read_request
from kdkernels.compression.student import answer_queries, rationale
from kdkernels.curation.asking import Teacher, ask, given, teacher
from kdkernels.curation.chat import Chat, Conversation, Failure
from kdkernels.curation.config import read_curation
from kdkernels.curation.journal import Journal
from kdkernels.data.jsonl import json_line
from kdkernels.data.records import records
from kdkernels.data.texts import render
from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import FINAL
from kdkernels.training.recipe.stages import Compression
from kdkernels.training.run.atomic import write_text
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.identity import identify

REWRITTEN = "rewritten"
LISTENING = 10.0  # seconds after which the other processes hear that process 0 still asks


class TeacherCompressor:
    """Has each rationale rewritten by the teacher that wrote it, as a `Compressor` of training/stages.py.

    Process 0 asks the teachers; all processes share the student's answers.

    Args:
        chats: teachers by their names, instead of those of the recipe's [curation] section.
    """

    def __init__(self, chats: Mapping[str, Chat] | None = None):
        self.chats = dict(chats or {})

    def check(self, compression: Compression) -> None:
        """Raises InputError where the wording, the pattern, the teachers or records that are there cannot be used; all
        processes call this together.
        """
        distributed.by_first(lambda: self._check(compression))

    def make(self, compression: Compression) -> None:
        """Makes `compression.output`, or goes on with it; all processes call this together.

        Raises:
            InputError: records or teachers that cannot be used, or a directory in which another compression was begun.
            ServerError: a teacher that does not answer; the same again goes on from there.
            DiskError: what the disk did not take.
        """
        output = Path(compression.output)
        with RunDirectory(output.parent).locked():
            if distributed.by_first(lambda: self._begin(compression, output)):
                return
            texts = {}
            if compression.settings.compressor == "teacher":
                texts = answer_queries(compression, output.parent / "answers")
            if distributed.rank() == 0:
                rewriting = Rewriting(compression, self._teachers(compression), texts)
            _while_others_wait(lambda: rewriting.ask())
            distributed.by_first(lambda: rewriting.finish())

    def _teachers(self, compression: Compression) -> dict[str, Teacher]:
        """The teachers by their names. Raises InputError."""
        if self.chats:
            return {name: given(name, chat) for name, chat in self.chats.items()}
        if compression.settings.teachers is None:
            raise InputError("section [curation] is missing: it has the teachers that are to rewrite their rationales")
        curation = read_curation(compression.settings.teachers)
        return {one.name: teacher(one) for one in curation.teachers}

    def _check(self, compression: Compression) -> None:
        settings = compression.settings
        read_request(settings)
        if settings.pattern is not None:
            try:
                groups = re.compile(settings.pattern).groups
            except (re.error, RecursionError, OverflowError) as error:
                raise InputError(f"[reasoning] pattern: not a regular expression: {error}") from error
            if groups != 1:
                raise InputError(f"[reasoning] pattern: expected one group, got {groups} in {settings.pattern!r}")
        names = set(self._teachers(compression))
        if Path(compression.source).exists() or compression.source.startswith("hf:"):
            for number, record in records(compression.source):
                _check_record(record, f"{compression.source}, line {number}", settings, names)
            for _ in read_queries(compression):  # which refuses those that cannot be filled in
                pass

    def _begin(self, compression: Compression, output: Path) -> bool:
        """Whether all is made; else the directory is that of this compression from here on."""
        self._check(compression)
        final = str(Path(compression.student.run.output) / FINAL)
        told = asdict(compression.settings)
        told = {key: told[key] for key in sorted(told.keys() - {"batch_size", "at_once", "teachers", "request"})}
        request = read_request(compression.settings)
        made_from = {
            **identify({"[data] train": compression.source, "[student] path": final}),
            "[data] prompt": str(compression.student.data.prompt),
            "[reasoning]": told,
            "request": hashlib.sha256(repr(request).encode()).hexdigest(),
            "teachers": {name: dict(one.identity) for name, one in self._teachers(compression).items()},
        }
        made_from = json.loads(json.dumps(made_from))
        manifest = output.with_name("manifest.json")
        if manifest.is_file():
            before = json.loads(manifest.read_text(encoding="utf-8"))
            differing = [key for key in {**before, **made_from} if before.get(key) != made_from.get(key)]
            if differing:
                raise InputError(
                    f"{output.parent}: the compressed rationales there were made from something else: "
                    f"{', '.join(differing)} differ. Put back what they were made from, or give the stages another "
                    "[run] output"
                )
        else:
            write_text(manifest, json.dumps(made_from, indent=1))
        return output.is_file()


class Rewriting:
    """Process 0's part: who is asked what, and what becomes of the records."""

    def __init__(self, compression: Compression, teachers: Mapping[str, Teacher], texts: Mapping[int, str]):
        self.output, self.settings = Path(compression.output), compression.settings
        self.request, self.teachers, self.texts = read_request(self.settings), teachers, texts
        self.records = list(records(compression.source))
        queries = dict(read_queries(compression))
        self.asked = {number: self._conversation(number, record, queries[number]) for number, record in self.records}

    def ask(self) -> None:
        """Asks what is not answered yet. Raises ServerError, DiskError."""
        questions: dict[str, list[Conversation]] = {}
        for number, record in self.records:
            if self.asked[number] is not None:
                questions.setdefault(record[self.settings.teacher], []).append(self.asked[number])
        with closing(self._journal()) as journal:
            ask([self.teachers[name] for name in questions], questions, journal)

    def finish(self) -> None:
        """Writes what came of it. Raises DiskError, and InputError where no record is left."""
        kept, decisions, own = [], [], self.settings.rationale
        with closing(self._journal()) as journal:
            for number, record in self.records:
                text, outcome = self._outcome(number, record, journal)
                decisions.append(self._decision(number, record, text, outcome))
                if outcome == REWRITTEN or self.settings.unusable == "keep":
                    kept.append(record | {own: text} if outcome == REWRITTEN else record)
        counts = dict(Counter(one["outcome"] for one in decisions).most_common())
        write_text(self.output.with_name("decisions.jsonl"), "".join(map(json_line, decisions)))
        write_text(self.output.with_name("counts.json"), json.dumps(counts, indent=1))
        if not kept:
            raise InputError(f"{self.output}: no record is left of {len(decisions)}: {counts}")
        write_text(self.output, "".join(json.dumps(record) + "\n" for record in kept))  # last: it says that all is done

    def _journal(self) -> Journal:
        return Journal(self.output.with_name("rewritings.jsonl"))

    def _conversation(self, number: int, record: dict[str, Any], query: str) -> Conversation | None:
        """What the rationale's teacher is asked; None where the student's answer has no rationale."""
        own = record[self.settings.rationale]
        values = {"query": query, "rationale": own, "words": str(self.settings.words)}
        if self.settings.compressor == "teacher":
            written = self._student(number)
            if written is None:
                return None
            values["student"] = written
        turns = [("user", values["query"]), ("assistant", own), ("user", self.request.ask(values))]
        return [{"role": role, "content": content} for role, content in turns]

    def _student(self, number: int) -> str | None:
        pattern = self.settings.pattern
        return rationale(pattern, self.texts[number]) if pattern and number in self.texts else None

    def _outcome(self, number: int, record: dict[str, Any], journal: Journal) -> tuple[str, str]:
        """The rewritten rationale, or nothing, and why."""
        conversation = self.asked[number]
        if conversation is None:
            return "", "no rationale of the student" if number in self.texts else "query too long for the student"
        found = journal.get(self.teachers[record[self.settings.teacher]].address(conversation))
        if isinstance(found, Failure):
            return "", f"no reply: {found.kind}"
        if found.truncated:
            return "", "truncated"
        try:
            text = self.request.read(found.text)
        except Unusable as error:
            return "", str(error)
        if self.settings.compressor == "length" and len(text.split()) > self.settings.words:
            return "", "too many words"
        return text, REWRITTEN

    def _decision(self, number: int, record: dict[str, Any], text: str, outcome: str) -> dict[str, Any]:
        written = self._student(number)
        texts = {"": record[self.settings.rationale], "student_": written, "rewritten_": text or None}
        words = {f"{name}words": None if one is None else len(one.split()) for name, one in texts.items()}
        teacher = record[self.settings.teacher]
        return {"line": number, "teacher": teacher, "outcome": outcome, "student": written, **words}


def read_queries(compression: Compression) -> Iterator[tuple[int, str]]:
    """What the teachers were asked, by the record's number. Raises InputError."""
    keys = ("[reasoning] query", "")
    for number, query, _ in render(compression.source, compression.settings.query, None, keys=keys):
        yield number, query


def _while_others_wait(work: Callable[[], None]) -> None:
    """Process 0 does the work, which may take hours; the others hear every few seconds that it is at it. What it raises
    is raised on all processes.
    """
    if distributed.world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if distributed.rank() == 0 else None

        def ended() -> bool:
            with suppress(TimeoutError):
                future.result(LISTENING)
                return True
            return False

        while not distributed.by_first(ended):
            pass


def _check_record(record: Mapping[str, Any], place: str, settings, names: set[str]) -> None:
    for key in (settings.rationale, settings.teacher):
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{place}: field {key!r}: expected a text that is not empty, got {value!r}")
    if record[settings.teacher] not in names:
        raise InputError(
            f"{place}: the rationale's teacher is {record[settings.teacher]!r}, which the recipe does not have: "
            f"expected one of {', '.join(sorted(names))}"
        )
