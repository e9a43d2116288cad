"""The way from queries to a dataset: all answers first, then the decisions, which follow from them alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.curation import queries as reading
from kdkernels.curation.asking import Teacher, ask, given, teacher
from kdkernels.curation.chat import Answer, Chat, Failure
from kdkernels.curation.config import CurationConfig, check, settings
from kdkernels.curation.embedding import Embedding
from kdkernels.curation.embedding import identity as embedding_identity
from kdkernels.curation.files import (
    ANSWERS,
    DATASET,
    DECISIONS,
    FAILURES,
    REPORT,
    Lines,
    opened,
    write_manifest,
)
from kdkernels.curation.journal import Journal
from kdkernels.curation.parse import canonical
from kdkernels.curation.prompts import Prompt, file_of
from kdkernels.curation.queries import Query, conversation, read_queries
from kdkernels.curation.report import Report
from kdkernels.curation.selection import Decision, Selection
from kdkernels.errors import InputError
from kdkernels.training.run.atomic import write_text
from kdkernels.training.run.hashes import sha256


def curate(
    config: CurationConfig,
    *,
    chats: Mapping[str, Chat] | None = None,
    correct: Callable[[str, str], bool] | None = None,
    embedding: Embedding | None = None,
) -> Path:
    """Makes the dataset of a recipe: asks every teacher every query, and keeps the answers that are chosen.

    A run that was interrupted goes on; one that is finished makes the same files again, and asks only for what servers
    had failed to answer.

    Args:
        config: as `read_curation` returns it.
        chats: teachers of the caller's own, by their name in the recipe, in place of what it says of them.
        correct: whether a label is right, given the right answer, for quality "correct": of programs, what runs them.
        embedding: with `similarities`, `cut` and `length`, in place of the recipe's; the manifest has its class's name.

    Returns:
        The path of dataset.jsonl: of each kept answer query, rationale, label, teacher, confidence, logprob, response
        and the line of the query; ordered by line and teacher.

    Raises:
        InputError: the recipe, the queries or the directory cannot be used; no answer is kept.
        MissingPackage: a package of kdkernels[curation] is needed and not installed.
        ServerError: a teacher does not answer. What was answered is kept.
        DiskError: the disk did not take what had to be written.
    """
    chats = dict(chats or {})
    prompt = check(config, tuple(chats), embedded=embedding is not None)
    if prompt.labels == "code" and config.quality == "correct" and correct is None:
        raise InputError(
            '[curation] quality: "correct" of programs needs a function that runs their tests: curate(config, '
            "correct=...) from Python"
        )
    plan = Plan(config, prompt, read_queries(config), _teachers(config, chats), embedding)
    root = Path(config.output)
    with opened(root, plan.made_from()):
        embedding = (embedding or Embedding(config.embedding)) if plan.embeds() else None
        with closing(Journal(Path(config.answers or root / ANSWERS))) as journal:
            ask(plan.teachers, plan.questions(), journal)
            results, report = _write(root, plan, journal, Selection(config, prompt, correct), embedding)
        cut = (embedding.cut, embedding.length) if embedding else (0, None)
        write_text(root / REPORT, report.text(*cut))
        write_manifest(root, plan.made_from(), results)
    if not results[DATASET]["lines"]:
        raise InputError(f"[curation]: no answer is kept: {root / REPORT} says why")
    return root / DATASET


@dataclass(frozen=True)
class Plan:
    """Who is asked what."""

    config: CurationConfig
    prompt: Prompt
    queries: Sequence[Query]
    teachers: Sequence[Teacher]
    embedding: Embedding | None = None

    def asked(self, query: Query) -> list[Mapping[str, str]]:
        """What every teacher is asked for a query."""
        return conversation(self.prompt.ask(query.text))

    def questions(self) -> dict[str, list[list[Mapping[str, str]]]]:
        """What each teacher is asked, by its name."""
        conversations = [self.asked(query) for query in self.queries]
        return {one.name: conversations for one in self.teachers}

    def embeds(self) -> bool:
        """Whether rationales are compared."""
        return self.config.diversity == "embedding" and len(self.teachers) >= 3

    def made_from(self) -> dict[str, dict[str, Any]]:
        """What decides which dataset comes out."""
        files = {"queries": reading.identity(self.config.queries), "prompt": sha256(file_of(self.config.task))}
        if self.embeds():
            own = self.embedding and type(self.embedding).__qualname__
            files["embedding"] = own or embedding_identity(self.config.embedding)
        identities = {one.name: dict(one.identity) for one in self.teachers}
        return {"settings": settings(self.config), "files": files, "teacher": identities}


def plan_of(config: CurationConfig) -> Plan:
    """What a run of the recipe would do; nothing is asked and nothing written. Raises as `curate`."""
    return Plan(config, check(config), read_queries(config), _teachers(config, {}))


def _teachers(config: CurationConfig, chats: Mapping[str, Chat]) -> list[Teacher]:
    unknown = set(chats) - {one.name for one in config.teachers}
    if unknown:
        raise InputError(f"chats: expected names of teachers of the recipe, got {sorted(unknown)[0]!r}")
    return [given(one.name, chats[one.name]) if one.name in chats else teacher(one) for one in config.teachers]


def _write(
    root: Path, plan: Plan, journal: Journal, selection: Selection, embedding: Embedding | None
) -> tuple[dict[str, Any], Report]:
    """Writes dataset, decisions and failures: what the answers lead to, in the order of the queries."""
    report = Report(plan.config)
    with Lines(root / DATASET) as dataset, Lines(root / DECISIONS) as said, Lines(root / FAILURES) as failures:
        for query in plan.queries:
            addresses = {one.name: one.address(plan.asked(query)) for one in plan.teachers}
            found = [(name, journal.get(where)) for name, where in addresses.items()]
            decisions = selection.good(found, query.right)
            decisions = selection.diverse(decisions, query.text, embedding and embedding.similarities)
            for one in decisions:
                said.write(_decision(query, one, addresses[one.teacher]))
                if one.parsed is None:
                    failures.write(_failure(query, one, addresses[one.teacher]))
                if one.kept:
                    dataset.write(_sample(query, one, plan))
            for line in query.duplicates:
                said.write({"line": line, "kept": False, "why": "duplicate query", "of": query.line})
            labels = {canonical(one.parsed.label, plan.prompt.labels) for one in decisions if one.kept}
            report.add(decisions, labels, len(query.duplicates))
    return {one.path.name: one.result() for one in (dataset, said, failures)}, report


def _decision(query: Query, one: Decision, where: str) -> dict[str, Any]:
    parsed = one.parsed
    return {
        "line": query.line,
        "teacher": one.teacher,
        "kept": one.kept,
        "why": one.why,
        "label": parsed and parsed.label,
        "confidence": parsed and parsed.confidence,
        "logprob": one.found.logprob if isinstance(one.found, Answer) else None,
        "score": one.score,
        "similarity": one.similarity,
        "faults": list(one.found.faults),
        "address": where,
    }


def _failure(query: Query, one: Decision, where: str) -> dict[str, Any]:
    said = str(one.found) if isinstance(one.found, Failure) else one.found.text
    return {"line": query.line, "teacher": one.teacher, "why": one.why, "said": said, "address": where}


def _sample(query: Query, one: Decision, plan: Plan) -> dict[str, Any]:
    parsed = one.parsed
    response = plan.prompt.respond(parsed.rationale, parsed.label)
    if plan.config.score_in_response:
        response += f"\n\nscore: {parsed.confidence:.2f}"
    return {
        "query": query.text,
        "rationale": parsed.rationale,
        "label": parsed.label,
        "teacher": one.teacher,
        "confidence": parsed.confidence,
        "logprob": one.found.logprob,
        "response": response,
        "line": query.line,
    }
