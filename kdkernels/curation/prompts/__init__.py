"""Prompt files: what a teacher is told, how its answer is read and what a student learns of it.

The files beside this one are those of `task` "code", "multiple_choice" and "mathematics". One of your own has the same
keys:

prompt    what the teacher is told; {query} and {criteria} are filled in
labels    how two labels are compared: "text", "number", "choice" (the letter of one) or "code"
response  what the student learns: a template of {rationale}, {label}
sections  of `rationale`, `label` and `confidence`, in this order, the marks around them
criteria  what the confidence is made of: name, weight, meaning; the weights add up to 1
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdkernels.errors import InputError
from kdkernels.training.recipe.schema import parse_section, read_toml

HERE = Path(__file__).parent
PARTS = ("rationale", "label", "confidence")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A part of the confidence: the share `weight` of it goes to `meaning`."""

    name: str
    weight: float
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The marks before and behind each part of an answer."""

    rationale: tuple[str, str]
    label: tuple[str, str]
    confidence: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt file."""

    prompt: str
    labels: Literal["text", "number", "choice", "code"]
    response: str
    sections: Sections
    criteria: tuple[Criterion, ...] = ()

    def ask(self, query: str) -> str:
        """What the teacher is told."""
        listed = "\n".join(f"- {one.name} ({one.weight * 100:g} %): {one.meaning}" for one in self.criteria)
        return _fill(self.prompt, {"query": query, "criteria": listed})

    def respond(self, rationale: str, label: str) -> str:
        """What the student learns."""
        return _fill(self.response, {"rationale": rationale, "label": label})


def names() -> list[str]:
    """The tasks that have a prompt file here."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def read_prompt(task: str) -> Prompt:
    """The prompt file of a task, or at a path. Raises InputError."""
    path = file_of(task)
    prompt = parse_section(Prompt, read_toml(path), f"{path}: [prompt]")
    for key, field in (("prompt", "query"), ("response", "label")):
        if f"{{{field}}}" not in getattr(prompt, key):
            raise InputError(f"{path}: {key}: expected {{{field}}} in it")
    if bool(prompt.criteria) != ("{criteria}" in prompt.prompt):
        raise InputError(f"{path}: criteria: expected them listed, and {{criteria}} in the prompt, or neither")
    if prompt.criteria and abs(sum(one.weight for one in prompt.criteria) - 1) > 1e-9:
        total = sum(one.weight for one in prompt.criteria)
        raise InputError(f"{path}: criteria: expected weights that add up to 1, got {total:g}")
    for part in PARTS:
        if not all(mark.strip() for mark in getattr(prompt.sections, part)):
            raise InputError(f"{path}: sections {part}: expected two marks, got an empty one")
    return prompt


def file_of(task: str) -> Path:
    """Where the prompt file of a task lies. Raises InputError."""
    if not task.endswith(".toml") and task not in names():
        raise InputError(
            f"[curation] task: expected one of {', '.join(names())}, or the path of a prompt file (.toml), got {task!r}"
        )
    return Path(task) if task.endswith(".toml") else HERE / f"{task}.toml"


def _fill(template: str, values: dict[str, str]) -> str:
    """The template with each {name} of `values` replaced; other braces stay, also those in the values."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], template)
