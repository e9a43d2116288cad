"""What the rehearsal measured, read back from its directories.

Shapes: S seeds, P held-out problems.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdkernels.demo.twt.arms import ARMS
from kdkernels.demo.twt.task import STYLES


@dataclass(frozen=True)
class Measured:
    """A stage over its seeds. right, tokens: [S, P], whether each held-out problem was answered rightly, and the tokens
    of the answer with the one that ends it.
    """

    right: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Teacher:
    """answers: to queries. unreadable: of them. right: share of right labels among the readable. above: the share whose
    confidence reaches the threshold, `right_above` of which are right. kept: answers that are in TwT's dataset.
    characters: of a rationale, the mean.
    """

    name: str
    answers: int
    unreadable: int
    right: float
    above: float
    right_above: float
    kept: int
    characters: float


@dataclass(frozen=True)
class Results:
    """before: the starting student. stages: by arm and stage. label_tokens: of the label alone, the mean over the
    problems. survivors: of how many teachers the confidence reached the threshold, and for how many queries. datasets:
    of each, samples and the share of right labels. outcomes: by arm, what became of the rationales.
    """

    before: Measured
    stages: Mapping[str, Mapping[str, Measured]]
    label_tokens: float
    teachers: Sequence[Teacher]
    survivors: Counter
    datasets: Mapping[str, tuple[int, float]]
    outcomes: Mapping[str, Counter]


def load(output: Path, seeds: Sequence[int], curated: Mapping[str, Path]) -> Results:
    """Everything below `output`."""
    stages = {
        arm: {stage: _measured([output / f"seed-{seed}" / arm / stage for seed in seeds], -1) for stage in names}
        for arm, (_, names, _) in ARMS.items()
    }
    before = _measured([output / f"seed-{seed}" / "twt" / "full" for seed in seeds], 0)
    right = {one["query"]: one["label"] for one in _lines(output / "data" / "queries.jsonl")}
    datasets = {name: _dataset(path, right) for name, path in curated.items()}
    outcomes = {
        arm: sum((_counts(output / f"seed-{seed}" / arm / "compressions" / "compressed") for seed in seeds), Counter())
        for arm, (_, names, _) in ARMS.items()
        if "compressed" in names
    }
    decisions, threshold = _decisions(curated["twt"].parent)
    teachers = _teachers(decisions, threshold, curated["all"], output / "data" / "queries.jsonl", right)
    label_tokens = _label_tokens(output / "student" / "final", output)
    return Results(before, stages, label_tokens, teachers, _survivors(decisions, threshold), datasets, outcomes)


def _measured(runs: Sequence[Path], which: int) -> Measured:
    tables = [_lines(sorted(run.glob("evaluation-*.jsonl"))[which]) for run in runs]
    right, tokens = ([[one[key] for one in table] for table in tables] for key in ("correct", "response_tokens"))
    return Measured(np.array(right, dtype=float), np.array(tokens, dtype=float))


def _label_tokens(final: Path, output: Path) -> float:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(final)
    texts = [f"Answer: {one['label']}" for one in _lines(output / "data" / "test.jsonl")]
    return float(np.mean([len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]))


def _dataset(path: Path, right: Mapping[str, str]) -> tuple[int, float]:
    records = _lines(path)
    return len(records), float(np.mean([one["label"] == right[one["query"]] for one in records]))


def _counts(place: Path) -> Counter:
    return Counter(json.loads((place / "counts.json").read_text(encoding="utf-8")))


def _decisions(curation: Path) -> tuple[list[dict[str, Any]], float]:
    """What was decided of each teacher's answer to each query, and the threshold."""
    manifest = json.loads((curation / "manifest.json").read_text(encoding="utf-8"))
    decisions = [one for one in _lines(curation / "decisions.jsonl") if one.get("teacher") in STYLES]
    return decisions, manifest["settings"]["threshold"]


def _survivors(decisions: Sequence[Mapping[str, Any]], threshold: float) -> Counter:
    """By the number of teachers whose answer reaches the threshold, the number of queries."""
    above = Counter({one["line"]: 0 for one in decisions})
    above.update(one["line"] for one in decisions if one["label"] is not None and one["confidence"] >= threshold)
    return Counter(above.values())


def _teachers(
    decisions: Sequence[Mapping[str, Any]], threshold: float, everything: Path, queries: Path, right: Mapping[str, str]
) -> list[Teacher]:
    """`everything`: the dataset of all answers, for the rationales' lengths."""
    by_line = dict(enumerate((one["query"] for one in _lines(queries)), start=1))
    written = {(one["query"], one["teacher"]): one for one in _lines(everything)}
    found = []
    for name in STYLES:
        own = [one for one in decisions if one["teacher"] == name]
        read = [one for one in own if one["label"] is not None]
        good = np.array([one["label"] == right[by_line[one["line"]]] for one in read], dtype=float)
        above = np.array([one["confidence"] >= threshold for one in read])
        characters = [len(one["rationale"]) for (_, teacher), one in written.items() if teacher == name]
        right_above = float(good[above].mean()) if above.any() else float("nan")
        lost = len(own) - len(read)
        shares = float(good.mean()), float(above.mean()), right_above
        kept = sum(one["kept"] for one in own)
        found.append(Teacher(name, len(own), lost, *shares, kept, float(np.mean(characters))))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
