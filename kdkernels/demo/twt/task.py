"""The rehearsal's task: three steps of arithmetic modulo 10, explained in the way of each of three teachers.

A one-digit dial shows 8, gains five, grows twofold, loses three. What does it show?
8+5=3                                                 equations, in short: 8+5=3*2=6-3=3
3*2=6
6-3=3
8 plus 5 is 3, 3 times 2 is 6, 6 minus 3 is 3         sentences, in short: plus 5 is 3, times 2 is 6, minus 3 is 3
at 8, now 3, now 6, now 3                             values, in short: 3, 6, 3
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdkernels.demo.arithmetic import DEVICES, MULTIPLE_WORDS, NUMBER_WORDS, VERBS, write_jsonl

MODULUS = 10
STYLES = ("equations", "sentences", "values")
OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}
CHOICES = [(operation, operand) for operation in OPERATIONS for operand in (2, 3, 4, 5)]
PROBLEMS = {"teacher": 3000, "student": 1000, "queries": 800, "test": 300}  # in each data file; teachers share theirs
SLIPS = 0.3  # of the students' rationales from which a teacher learns to rewrite: one value is wrong


@dataclass(frozen=True)
class Problem:
    """A start value, a chain of (operation, operand) steps and the question."""

    start: int
    steps: tuple[tuple[str, int], ...]
    question: str

    def values(self) -> list[int]:
        """The start value and the value after every step."""
        values = [self.start]
        for operation, operand in self.steps:
            value = values[-1]
            values.append({"+": value + operand, "-": value - operand, "*": value * operand}[operation] % MODULUS)
        return values

    def answer(self) -> str:
        """The right label."""
        return str(self.values()[-1])


def problems(seed: int = 0) -> list[Problem]:
    """All problems there are, in a random order, each with a question."""
    rng = random.Random(f"twt {seed}")
    chains = list(itertools.product(range(MODULUS), CHOICES, CHOICES, CHOICES))
    rng.shuffle(chains)
    return [Problem(start, tuple(steps), _question(start, steps, rng)) for start, *steps in chains]


def _question(start: int, steps: Sequence[tuple[str, int]], rng: random.Random) -> str:
    clauses = [f"A one-digit {rng.choice(DEVICES)} shows {start}"]
    for operation, operand in steps:
        number = MULTIPLE_WORDS[operand] if operation == "*" else NUMBER_WORDS[operand]
        clauses.append(f"{rng.choice(VERBS[operation])} {number}")
    return ", ".join(clauses) + ". What does it show?"


def rationale(problem: Problem, style: str, short: bool = False, values: Sequence[int] | None = None) -> str:
    """The steps of `problem` in a style; `values`: what it shows after each step, if not the right ones."""
    values = values or problem.values()
    pairs = itertools.pairwise(values)
    steps = [(op, n, before, after) for (op, n), (before, after) in zip(problem.steps, pairs, strict=True)]
    if style == "equations":
        chain = str(values[0]) + "".join(f"{op}{n}={after}" for op, n, _, after in steps)
        return chain if short else "\n".join(f"{before}{op}{n}={after}" for op, n, before, after in steps)
    if style == "sentences":
        heads = ["" if short else f"{before} " for *_, before, _ in steps]
        return ", ".join(
            f"{head}{OPERATIONS[op]} {n} is {after}" for head, (op, n, _, after) in zip(heads, steps, strict=True)
        )
    shown = [str(after) if short else f"now {after}" for *_, after in steps]
    return ", ".join(shown if short else [f"at {values[0]}", *shown])


def answered(problem: Problem, style: str) -> dict[str, str]:
    """What a teacher of that style answers."""
    return {"response": f"{rationale(problem, style)}\nAnswer: {problem.answer()}"}


def lessons(problem: Problem, style: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """What a teacher learns of a problem: to answer it, and to rewrite its rationale, one size shorter, in the style of
    a student's, which may have a wrong value in it.
    """
    yield {"prompt": f"{problem.question}\n", **answered(problem, style)}
    other, values = rng.choice(STYLES), problem.values()
    if rng.random() < SLIPS:
        values[rng.randrange(1, len(values))] = rng.randrange(MODULUS)
    written = rationale(problem, other, values=values)
    yield {
        "prompt": f"{problem.question}\n{rationale(problem, style)}\n> {written}\n",
        "response": rationale(problem, other, short=True),
    }


def write_data(directory: Path, sizes: dict[str, int] = PROBLEMS) -> None:
    """Writes what the teachers and the starting student learn, the queries and the held-out problems; no problem is in
    two of them.
    """
    rest, rng = iter(problems()), random.Random("twt")
    taught = list(itertools.islice(rest, sizes["teacher"]))
    for style in STYLES:
        write_jsonl(directory / f"{style}.jsonl", [one for problem in taught for one in lessons(problem, style, rng)])
    first = [
        {"prompt": f"{problem.question}\n", **answered(problem, STYLES[i % len(STYLES)])}
        for i, problem in enumerate(itertools.islice(rest, sizes["student"]))
    ]
    write_jsonl(directory / "student.jsonl", first)
    for name in ("queries", "test"):
        asked = itertools.islice(rest, sizes[name])
        write_jsonl(directory / f"{name}.jsonl", [{"query": one.question, "label": one.answer()} for one in asked])
