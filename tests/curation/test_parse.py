"""Answers are read strictly, and labels compared by what they say."""

import pytest

from kdkernels.curation import Answer
from kdkernels.curation.parse import Parsed, Unreadable, canonical, parse
from kdkernels.curation.prompts import names, read_prompt
from kdkernels.errors import InputError

from .oracle import sections

PROMPT = read_prompt("mathematics")


def read(text: str, prompt=PROMPT, truncated: bool = False) -> Parsed:
    return parse(Answer(text, 1, 1, truncated=truncated), prompt)


def test_the_parts():
    assert read(sections("Two lines,\n\nwith < and {braces}.", " 15 ", "0.95")) == Parsed(
        "Two lines,\n\nwith < and {braces}.", "15", 0.95
    )
    for text, value in (("1", 1.0), ("0", 0.0), (".5", 0.5), ("1.00", 1.0), ("0.", 0.0), (" 0.125 ", 0.125)):
        assert read(sections("r", "l", text)).confidence == value


FINE = sections("r", "l", "0.9")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "rationale is missing"),
        ("I do not know.", "rationale is missing"),
        (FINE[: FINE.index("</rat")], "rationale has no end"),
        (FINE[: FINE.index("<lab")], "label is missing"),
        (FINE[: FINE.index("<conf")], "confidence is missing"),
        (FINE[: FINE.index("</conf")], "confidence has no end"),
        (sections(" \n ", "l", "0.9"), "rationale is empty"),
        (sections("r", " ", "0.9"), "label is empty"),
        (sections("r", "l", ""), "confidence is empty"),
        (sections("r", "l", "high"), "confidence is no decimal number"),
        (sections("r", "l", "95%"), "confidence is no decimal number"),
        (sections("r", "l", "nan"), "confidence is no decimal number"),
        (sections("r", "l", "0,95"), "confidence is no decimal number"),
        (sections("r", "l", "٠.٩"), "confidence is no decimal number"),
        (sections("r", "l", "1.01"), "confidence is outside [0, 1]"),
        (sections("r", "l", "-0.5"), "confidence is outside [0, 1]"),
        ("Sure!" + FINE, "text outside the sections"),
        (FINE + "Hope that helps.", "text outside the sections"),
        (FINE.replace("<label>", "so: <label>"), "text outside the sections"),
        (FINE + FINE, "a section is there twice"),
        (FINE.replace("<rationale>", "<rationale><rationale>"), "rationale is there twice"),
        ("<label>l</label><rationale>r</rationale><confidence>1</confidence>", "text outside the sections"),
        ("<rationale>r<label>l</label></rationale><confidence>1</confidence>", "label is missing"),
        (FINE.replace("r", "\ud83e", 1).replace("<\ud83eationale>", "<rationale>r\ud83e"), "broken characters"),
    ],
)
def test_what_is_not_read(text, kind):
    with pytest.raises(Unreadable) as caught:
        read(text)
    assert str(caught.value) == kind


def test_a_truncated_answer_is_not_read():
    with pytest.raises(Unreadable, match="truncated"):
        read(FINE, truncated=True)


def test_code_keeps_its_shape():
    prompt = read_prompt("code")
    code = "    x = 1\n    return x"
    assert read(sections("r", f"\n{code}\n", "1"), prompt).label == code
    assert read(sections("r", f"```python\n{code}\n```", "1"), prompt).label == code
    with pytest.raises(Unreadable, match="label is empty"):
        read(sections("r", "```python\n\n```", "1"), prompt)
    assert prompt.respond("why {label}", "f{x}") == "why {label}\n\n```python\nf{x}\n```"


@pytest.mark.parametrize(
    ("labels", "same", "different"),
    [
        ("number", ["1234.5", "1,234.50", "$1234.5", "2469/2", " +1234.5. "], ["1234", "1,23", "x"]),
        ("number", ["1/2", "0.5", ".50"], ["2/4 m", "1 1/2", "11/2", "1/0"]),
        ("number", ["x + 1", "X  +  1"], ["x+1"]),
        ("choice", ["B", "(b)", "b.", "B) a dog", "b: cat"], ["A", "bb", "b dog"]),
        ("choice", ["a dog", "A dog"], ["A"]),
        ("text", ["Yes", " yes "], ["no"]),
        ("code", ["x = 1"], ["x = 1 ", "X = 1"]),
    ],
)
def test_labels_that_say_the_same(labels, same, different):
    assert len({canonical(one, labels) for one in same}) == 1
    assert canonical(same[0], labels) not in {canonical(one, labels) for one in different}


def test_huge_numbers_are_compared_as_text():
    assert canonical("9" * 5000, "number") == "9" * 5000
    assert canonical("1/" + "9" * 5000, "number").startswith("1/")


def test_the_papers_weights():
    assert names() == ["code", "mathematics", "multiple_choice"]
    weights = {name: [one.weight for one in read_prompt(name).criteria] for name in names()}
    assert weights == {
        "code": [0.5, 0.2, 0.2, 0.1],
        "mathematics": [0.5, 0.25, 0.15, 0.1],
        "multiple_choice": [0.5, 0.25, 0.15, 0.1],
    }
    for name in names():
        prompt = read_prompt(name)
        asked = prompt.ask("How {many} <b>?")
        assert "How {many} <b>?" in asked and "{query}" not in asked and "{criteria}" not in asked
        assert all(f"({one.weight * 100:g} %)" in asked for one in prompt.criteria)
        example = asked[asked.index("<rationale>") : asked.index("</confidence>") + len("</confidence>")]
        with pytest.raises(Unreadable, match="no decimal number"):  # all but the example's number is as asked
            read(example, prompt)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("weight = 0.25", "weight = 0.3"), "weights that add up to 1, got 1.05"),
        (("{query}", "query"), r"expected \{query\} in it"),
        (("{criteria}", ""), r"\{criteria\} in the prompt, or neither"),
        (('"</label>"', '""'), "sections label: expected two marks"),
        (('labels = "number"', 'labels = "numbers"'), "expected one of 'text', 'number', 'choice', 'code'"),
        (("weight = 0.25", 'weight = "much"'), r"\[prompt.criteria\[1\]\] weight: expected a number"),
    ],
)
def test_a_prompt_file_that_is_none(tmp_path, change, said):
    from kdkernels.curation.prompts import file_of

    text = file_of("mathematics").read_text()
    assert change[0] in text
    (tmp_path / "own.toml").write_text(text)
    assert read_prompt(str(tmp_path / "own.toml")) == PROMPT
    (tmp_path / "own.toml").write_text(text.replace(*change))
    with pytest.raises(InputError, match=said):
        read_prompt(str(tmp_path / "own.toml"))
