"""What came of a curation, in counts: by teacher, by reason, by query; and what it cost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdkernels.curation.chat import Answer, Failure
from kdkernels.curation.config import CurationConfig, TeacherConfig
from kdkernels.curation.selection import KEPT, Decision

MILLION = 1e6


@dataclass
class Sums:
    """Of one teacher. `unmetered`: answers of which the server did not say how many tokens they are."""

    why: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    unmetered: int = 0

    def add(self, one: Decision) -> None:
        self.why[one.why] += 1
        self.faults.update(one.found.faults)
        if isinstance(one.found, Answer):
            self.tokens_in += one.found.tokens_in or 0
            self.tokens_out += one.found.tokens_out or 0
            self.unmetered += one.found.tokens_in is None or one.found.tokens_out is None

    def cost(self, teacher: TeacherConfig) -> float:
        """In the currency of the recipe's prices."""
        return (self.tokens_in * teacher.price_in + self.tokens_out * teacher.price_out) / MILLION


class Report:
    """Collects the decisions of one query after another."""

    def __init__(self, config: CurationConfig):
        self.config = config
        self.sums = {one.name: Sums() for one in config.teachers}
        self.kept: Counter = Counter()  # queries by the number of answers that are kept
        self.differing = self.duplicates = self.unanswered = 0

    def add(self, decisions: Sequence[Decision], labels: set[str], duplicates: int) -> None:
        """`labels`: of the answers that are kept, as they are compared."""
        for one in decisions:
            self.sums[one.teacher].add(one)
            self.unanswered += isinstance(one.found, Failure) and not one.found.final
        self.kept[sum(one.kept for one in decisions)] += 1
        self.differing += len(labels) > 1
        self.duplicates += duplicates

    def line(self) -> str:
        """All of it in one line."""
        queries, answers = self.kept.total(), sum(number * times for number, times in self.kept.items())
        return f"{answers} answers to {queries - self.kept[0]} of {queries} queries are kept" + (
            f"; {self.unanswered} were not given: the same again asks for them" if self.unanswered else ""
        )

    def text(self, cut: int, length: int | None) -> str:
        """In Markdown. `cut`: rationales of which the embedding model read `length` tokens only."""
        config, teachers = self.config, self.config.teachers
        header = "| teacher | asked | answered | readable | kept | tokens in | tokens out | cost | asked again for |"
        lines = ["# Curation", "", f"{self.line()}.", "", header, "|---|" + "---:|" * 7 + "---|"]
        lines += [self._row(one) for one in teachers]
        total = sum(self.sums[one.name].cost(one) for one in teachers)
        lines += ["", f"Cost in all, by the recipe's prices: {total:.4f}."]
        unmetered = sum(one.unmetered for one in self.sums.values())
        lines += [f"The tokens of {unmetered} answers are not known and not in it."] if unmetered else []
        lines += ["", "| what became of an answer | " + " | ".join(one.name for one in teachers) + " |"]
        lines += ["|---|" + "---:|" * len(teachers)]
        for why in sorted({why for one in self.sums.values() for why in one.why}, key=lambda why: (why != KEPT, why)):
            lines += [f"| {why} | " + " | ".join(str(self.sums[one.name].why[why]) for one in teachers) + " |"]
        lines += ["", "| answers that are kept of a query | queries |", "|---:|---:|"]
        lines += [f"| {number} | {self.kept[number]} |" for number in sorted(self.kept)]
        measured = config.quality in ("confidence", "log_probability")
        lines += ["", f"Quality: {config.quality}" + (f", at least {config.threshold:g}." if measured else ".")]
        lines += [f"Disagreement: {config.disagreement}. The labels kept of {self.differing} queries differ."]
        lines += [f"Diversity: {config.diversity}."]
        lines += [f"Lines whose query had come before: {self.duplicates}; it is asked and kept once."]
        if cut:
            lines += [f"The embedding model reads {length} tokens: it saw the beginning only of {cut} rationales."]
        return "\n".join(lines) + "\n"

    def _row(self, teacher: TeacherConfig) -> str:
        one = self.sums[teacher.name]
        asked = one.why.total()
        answered = asked - sum(times for why, times in one.why.items() if why.startswith("no answer"))
        readable = answered - sum(times for why, times in one.why.items() if why.startswith("unreadable"))
        again = ", ".join(f"{kind}: {times}" for kind, times in sorted(one.faults.items()))
        numbers = [asked, answered, readable, one.why[KEPT], one.tokens_in, one.tokens_out]
        return f"| {teacher.name} | {' | '.join(map(str, numbers))} | {one.cost(teacher):.4f} | {again} |"
