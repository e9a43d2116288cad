"""Multi-step arithmetic word problems with worked solutions: the demo's task.

    A two-digit dial shows 98, gains five, grows twofold, loses three. What does it show?
    98+5=03
    03*2=06
    06-3=03
    Answer: 03

A two-digit counter wraps, so the mathematics is a left-to-right chain of +, - and * modulo 100. How hard it is follows
from the number of steps and the largest operand (`Difficulty`). Train and test sets are disjoint by construction: a
keyed hash of the bare problem (its numbers and operations, not its wording) decides on which side it lies.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MODULUS = 100
TEST_SHARE = 0.2  # of all problems, by hash
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MULTIPLE_WORDS = {2: "twofold", 3: "threefold", 4: "fourfold", 5: "fivefold"}
DEVICES = ("counter", "dial", "display", "meter")
VERBS = {"+": ("gains", "adds", "climbs"), "-": ("loses", "drops", "sheds"), "*": ("grows", "swells", "expands")}


@dataclass(frozen=True)
class Difficulty:
    """How many steps a problem has, and operands from 2 to `max_operand` (factors stop at 5, where the words stop)."""

    min_steps: int = 3
    max_steps: int = 5
    max_operand: int = 5

    def __post_init__(self):
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"steps: expected 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        if not 2 <= self.max_operand <= 9:
            raise ValueError(f"max_operand: expected 2 to 9, got {self.max_operand}")

    def operands(self, operation: str) -> range:
        largest = min(self.max_operand, max(MULTIPLE_WORDS)) if operation == "*" else self.max_operand
        return range(2, largest + 1)

    def problems(self) -> int:
        """The number of different problems there are."""
        choices = sum(len(self.operands(operation)) for operation in "+-*")
        return MODULUS * sum(choices**steps for steps in range(self.min_steps, self.max_steps + 1))


@dataclass(frozen=True)
class Problem:
    """A start value and a chain of (operation, operand) steps, each taken modulo 100."""

    start: int
    steps: tuple[tuple[str, int], ...]

    def canonical(self) -> str:
        """The problem without its wording, such as `98+5*2-3`."""
        return f"{self.start:02d}" + "".join(f"{operation}{operand}" for operation, operand in self.steps)

    def side(self) -> str:
        """`"train"` or `"test"`: decided by a keyed hash of the canonical problem and nothing else."""
        digest = hashlib.blake2b(self.canonical().encode(), key=b"kdkernels demo split", digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"

    def values(self) -> list[int]:
        """The start value and the value after every step."""
        values = [self.start]
        for operation, operand in self.steps:
            value = values[-1]
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[operation]
            values.append(result % MODULUS)
        return values

    def solution(self) -> str:
        """The worked solution, one line per step, and the line `Answer: NN`."""
        values = self.values()
        lines = [
            f"{before:02d}{operation}{operand}={after:02d}"
            for (operation, operand), (before, after) in zip(self.steps, pairwise(values), strict=True)
        ]
        return "\n".join([*lines, f"Answer: {values[-1]:02d}"])

    def question(self, rng: random.Random) -> str:
        """The problem in words; `rng` picks among synonyms."""
        clauses = [f"A two-digit {rng.choice(DEVICES)} shows {self.start:02d}"]
        for operation, operand in self.steps:
            number = MULTIPLE_WORDS[operand] if operation == "*" else NUMBER_WORDS[operand]
            clauses.append(f"{rng.choice(VERBS[operation])} {number}")
        return ", ".join(clauses) + ". What does it show?"


def generate(side: str, seed: int, difficulty: Difficulty = Difficulty()) -> Iterator[dict]:
    """An endless stream of different problems of one side, as `{"question", "solution", "answer"}`.

    Slices of one stream do not overlap. Raises ValueError where half of that side's problems are used up: from there on
    drawing without repetition would slow to a crawl.
    """
    if side not in ("train", "test"):
        raise ValueError(f'side: expected "train" or "test", got {side!r}')
    share = TEST_SHARE if side == "test" else 1 - TEST_SHARE
    limit = int(share * difficulty.problems() / 2)
    rng = random.Random(f"{side} {seed}")
    seen = set()
    while len(seen) < limit:
        steps = []
        for _ in range(rng.randint(difficulty.min_steps, difficulty.max_steps)):
            operation = rng.choice("+-*")
            steps.append((operation, rng.choice(difficulty.operands(operation))))
        problem = Problem(rng.randrange(MODULUS), tuple(steps))
        if problem.side() != side or problem in seen:
            continue
        seen.add(problem)
        solution = problem.solution()
        yield {"question": problem.question(rng), "solution": solution, "answer": solution.rsplit(" ", 1)[1]}
    raise ValueError(
        f"{difficulty} has {difficulty.problems()} problems, too few for more than {limit} {side} problems"
    )


def write_jsonl(path: Path, examples: list[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
