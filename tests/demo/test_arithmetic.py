"""The word problems: their solutions against an independent reading of the words, and the split."""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkernels.demo.arithmetic import Difficulty, Problem, generate, write_jsonl
from kdkernels.demo.run import write_problems

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
FACTORS = {"twofold": 2, "threefold": 3, "fourfold": 4, "fivefold": 5}


def read_aloud(question):
    """The answer a reader of the words gets to, with the operation signs on the way."""
    start, clauses = re.fullmatch(r"A two-digit \w+ shows (\d\d), (.+)\. What does it show\?", question).groups()
    value, signs = int(start), ""
    for clause in clauses.split(", "):
        verb, number = clause.split(" ")
        if verb in ("grows", "swells", "expands"):
            value, signs = (value * FACTORS[number]) % 100, signs + "*"
        elif verb in ("gains", "adds", "climbs"):
            value, signs = (value + NUMBERS[number]) % 100, signs + "+"
        else:
            assert verb in ("loses", "drops", "sheds")
            value, signs = (value - NUMBERS[number]) % 100, signs + "-"
    return f"{value:02d}", signs


def test_solutions_follow_from_the_words():
    signs_seen = Counter()
    for example in islice(generate("train", seed=3, difficulty=Difficulty(1, 6, 9)), 500):
        answer, signs = read_aloud(example["question"])
        assert example["answer"] == answer
        *lines, last = example["solution"].split("\n")
        assert last == f"Answer: {answer}"
        assert len(lines) == len(signs)
        value = re.search(r"\d\d", example["question"])[0]
        for sign, line in zip(signs, lines, strict=True):
            before, operand, after = re.fullmatch(rf"(\d\d)\{sign}(\d)=(\d\d)", line).groups()
            assert before == value
            assert (eval(f"{int(before)}{sign}{operand}") - int(after)) % 100 == 0
            value = after
        assert value == answer
        signs_seen.update(signs)
    assert min(signs_seen[sign] for sign in "+-*") > 400  # of about 1750 steps


def test_a_counter_wraps_both_ways():
    problem = Problem(98, (("+", 5), ("-", 4), ("*", 5)))
    assert problem.values() == [98, 3, 99, 95]
    assert problem.solution() == "98+5=03\n03-4=99\n99*5=95\nAnswer: 95"
    assert problem.canonical() == "98+5-4*5"


def test_sides_are_disjoint_and_without_duplicates():
    def bare(example):
        return example["solution"].split("\n")[0][:2] + "".join(re.findall(r"[-+*]\d", example["solution"]))

    sides = {side: [bare(one) for one in islice(generate(side, seed=0), 3000)] for side in ("train", "test")}
    for problems in sides.values():
        assert len(set(problems)) == len(problems) == 3000
    assert not set(sides["train"]) & set(sides["test"])


@given(
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(2, 5)), min_size=1, max_size=5),
    st.integers(),
)
def test_wording_never_changes_the_side(start, steps, seed):
    problem = Problem(start, tuple(steps))
    assert read_aloud(problem.question(random.Random(seed)))[0] == problem.solution()[-2:]
    assert problem.side() == Problem(start, tuple(steps)).side() in ("train", "test")


def test_a_fifth_of_the_problems_is_for_tests():
    sides = [
        Problem(start, (("+", a), ("*", b))).side() for start in range(100) for a in range(2, 6) for b in range(2, 6)
    ]
    assert 0.17 < sides.count("test") / len(sides) < 0.23


def test_the_stream_depends_on_the_seed_alone():
    first, again, other = (list(islice(generate("train", seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_difficulty_sets_steps_and_operands():
    for example in islice(generate("train", 0, Difficulty(2, 3, 9)), 300):
        operations = re.findall(r"([-+*])(\d)=", example["solution"])
        assert 2 <= len(operations) <= 3
        assert all(int(operand) <= (5 if sign == "*" else 9) for sign, operand in operations)
    assert Difficulty(1, 2, 3).problems() == 100 * (6 + 36)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5, 5), "min_steps"), ((4, 3, 5), "min_steps"), ((3, 5, 1), "max_operand"), ((3, 5, 10), "max_operand")],
)
def test_difficulty_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Difficulty(*arguments)


def test_too_few_problems_and_unknown_sides_are_refused():
    with pytest.raises(ValueError, match="too few for more than 60 test problems"):
        list(generate("test", 0, Difficulty(1, 1, 3)))
    with pytest.raises(ValueError, match='"train" or "test", got \'dev\''):
        next(generate("dev", 0))


def test_lines_of_json(tmp_path):
    examples = list(islice(generate("train", 0), 3))
    write_jsonl(tmp_path / "deep" / "x.jsonl", examples)
    assert [json.loads(line) for line in (tmp_path / "deep" / "x.jsonl").read_text().splitlines()] == examples


def test_the_demos_data_files_do_not_overlap(tmp_path):
    write_problems(tmp_path)
    chains = {}
    for path in tmp_path.iterdir():
        solutions = [json.loads(line)["solution"] for line in path.read_text().splitlines()]
        chains[path.stem] = set(solutions)
        assert len(chains[path.stem]) == len(solutions)
    assert chains["few"] < chains.pop("many")
    assert {name: len(solutions) for name, solutions in chains.items()} == {
        "teacher": 19200,
        "few": 600,
        "new": 9600,
        "test": 1000,
    }
    assert len(set.union(*chains.values())) == 30400
