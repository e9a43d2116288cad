"""Which answers are kept: quality, agreement, diversity, each with its ties."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from kdkernels.curation import Answer, CurationConfig, Failure, TeacherConfig
from kdkernels.curation.prompts import read_prompt
from kdkernels.curation.selection import Selection
from kdkernels.errors import InputError

from .oracle import sections

NAMES = ("ann", "ben", "carla", "dora")


def config(**keys) -> CurationConfig:
    teachers = tuple(TeacherConfig(name=name, kind="local") for name in NAMES)
    return CurationConfig(output="o", queries="q", query="{q}", task="mathematics", teachers=teachers, **keys)


def choose(found, right="", query="q", similarities=None, task="mathematics", correct=None, **keys):
    """(why of each answer, the decisions): `found` has (label, confidence, logprob) of the teachers' answers."""
    selection = Selection(config(**keys), read_prompt(task), correct)
    answers = [
        each if isinstance(each, Failure) else Answer(sections(f"r{i}", each[0], each[1]), 1, 1, each[2])
        for i, each in enumerate(found)
    ]
    decisions = selection.good(list(zip(NAMES, answers, strict=False)), right)
    decisions = selection.diverse(decisions, query, similarities)
    return [one.why for one in decisions], decisions


def fine(count: int, labels: str = "111111") -> list:
    return [(labels[i], "0.99", -0.1) for i in range(count)]


def test_the_threshold_is_kept():
    whys, decisions = choose([("1", "0.95", -0.1), ("1", "0.949999", -0.1), ("1", "1", -0.1)])
    assert whys == ["kept", "confidence below the threshold", "kept"]
    assert [one.score for one in decisions] == [0.95, 0.949999, 1.0]
    assert choose([("1", "0.0", None)], threshold=0.0)[0] == ["kept"]
    assert choose([("1", "0.99", None)], threshold=1.0)[0] == ["confidence below the threshold"]


def test_log_probabilities():
    found = [("1", "0.1", math.log(0.8)), ("1", "0.99", math.log(0.79)), ("1", "0.99", None)]
    whys, decisions = choose(found, quality="log_probability", threshold=0.8 - 1e-9)
    assert whys == ["kept", "log-probability below the threshold", "no log-probability"]
    assert decisions[0].score == pytest.approx(0.8)


def test_correct_labels():
    found = [("1,000", "0.1", None), ("999", "0.99", None)]
    assert choose(found, "1000.0", quality="correct")[0] == ["kept", "wrong label"]
    assert choose(found, "?", quality="correct", correct=lambda label, right: label == "999" and right == "?")[0] == [
        "wrong label",
        "kept",
    ]


def test_no_answer_is_no_candidate():
    whys, _ = choose([Failure("time-out", "x"), ("1", "high", None), ("1", "0.1", None)], quality="none")
    assert whys == ["no answer: time-out", "unreadable: confidence is no decimal number", "kept"]


@pytest.mark.parametrize(
    ("labels", "disagreement", "kept"),
    [
        ("112", "keep", [0, 1, 2]),
        ("112", "drop", []),
        ("111", "drop", [0, 1, 2]),
        ("112", "majority", [0, 1]),
        ("1122", "majority", []),
        ("12", "majority", []),
        ("123", "majority", []),
        ("1", "majority", [0]),
        ("1112", "majority", [0, 1, 2]),
    ],
)
def test_labels_that_disagree(labels, disagreement, kept):
    whys, _ = choose(fine(len(labels), labels), disagreement=disagreement, diversity="none")
    assert [i for i, why in enumerate(whys) if why == "kept"] == kept
    assert set(whys) <= {"kept", "label disagrees"}


def test_a_rejected_answer_has_no_vote():
    found = [("1", "0.99", None), ("2", "0.9", None), ("2", "0.9", None)]
    assert choose(found, disagreement="majority")[0] == ["kept", *["confidence below the threshold"] * 2]


def table(**pairs: float):
    """Cosines of rationales r0, r1, ..., by pairs of their numbers; 1 for all others."""

    def similarities(texts):
        numbers = [text[1:] for text in texts]
        return [[pairs.get("p" + "".join(sorted(a + b)), 1.0) for a in numbers] for b in numbers]

    return similarities


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        ({"p01": 0.9, "p02": 0.5, "p12": 0.7}, [0, 2]),
        ({"p01": 0.9, "p02": 0.5, "p12": -0.7}, [1, 2]),
        ({"p01": 0.4, "p02": 0.4, "p12": 0.4}, [0, 1]),  # a tie: the teachers' order
        ({"p01": 0.5, "p02": 0.4, "p12": 0.4 - 1e-9}, [0, 2]),  # equal but for rounding
    ],
)
def test_the_pair_least_alike(pairs, kept):
    whys, decisions = choose(fine(3), similarities=table(**pairs))
    assert [i for i, why in enumerate(whys) if why == "kept"] == kept
    assert whys.count("not in the pair least alike") == 1
    value = round(pairs[f"p{kept[0]}{kept[1]}"], 6)
    assert [one.similarity for one in decisions if one.kept] == [value, value]


def test_cosines_that_are_no_numbers_choose_nobody():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="are no numbers"):
            choose(fine(3), similarities=table(p01=0.9, p02=value, p12=0.7))


def test_only_survivors_are_compared():
    found = fine(4)
    found[1] = ("1", "0.5", None)
    asked = []

    def similarities(texts):
        asked.append(list(texts))
        return table(p03=0.1)(texts)

    whys, _ = choose(found, similarities=similarities)
    assert asked == [["r0", "r2", "r3"]]
    assert whys == ["kept", "confidence below the threshold", "not in the pair least alike", "kept"]


@pytest.mark.parametrize("left", [0, 1, 2])
def test_fewer_survivors_are_all_kept(left):
    found = [("1", "0.99" if i < left else "0.1", None) for i in range(4)]
    assert choose(found)[0].count("kept") == left  # nothing is compared: there is nobody to ask


def test_random_pairs_depend_on_seed_and_query_alone():
    def pair(query, seed):
        whys, _ = choose(fine(3), query=query, diversity="random", seed=seed)
        assert whys.count("kept") == 2 and whys.count("not in the pair drawn") == 1
        return whys.index("not in the pair drawn")

    drawn = [pair(str(query), 0) for query in range(60)]
    assert drawn == [pair(str(query), 0) for query in range(60)]
    assert drawn != [pair(str(query), 1) for query in range(60)]
    assert min(Counter(drawn).values()) >= 10 and len(Counter(drawn)) == 3


def test_decisions_are_never_changed():
    selection = Selection(config(), read_prompt("mathematics"))
    good = selection.good([(name, Answer(sections("r", "1", "1"), 1, 1)) for name in NAMES], "")
    before = [replace(one) for one in good]
    assert len([one for one in selection.diverse(good, "q", table()) if one.kept]) == 2
    assert good == before
