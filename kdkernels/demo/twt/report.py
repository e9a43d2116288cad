"""The rehearsal's report in Markdown: tables 2 and 7 of the paper on a task of seconds, whatever comes out."""

import platform

import numpy as np
import torch

from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.demo.twt.arms import ARMS, BEST, STEPS, TITLES
from kdkernels.demo.twt.results import Measured, Results

COMPARED = (  # what the paper finds, as (what is claimed better, than what)
    ("the compressed stage is more often right than the full one", "twt/compressed", "twt/full"),
    ("the label stage is more often right than the compressed one", "twt/label", "twt/compressed"),
    ("three teachers beat the best single one", "twt/label", "single/label"),
    ("the same after the compressed stage", "twt/compressed", "single/compressed"),
    ("with rejection sampling beats without", "twt/label", "all/label"),
    ("the same after the compressed stage ", "twt/compressed", "all/compressed"),
    ("with the compression stage beats without", "twt/label", "no-compression/label"),
    ("TwT beats the labels alone", "twt/label", "label-only/label"),
)


def render(results: Results, seconds: float, cpu: float, cores: int) -> str:
    """The report of a rehearsal whose last run took `seconds` and `cpu` CPU seconds on `cores` cores."""
    seeds, problems = results.before.right.shape
    lines = [
        "# TwT, rehearsed",
        "",
        f"{problems} held-out problems of three steps of arithmetic modulo 10; {seeds} seeds of the stages, which "
        f"share the teachers and the starting student; {seconds:.0f} seconds, {cpu:.0f} CPU seconds, on "
        f"{cores} cores ({platform.machine()}, torch {torch.__version__}). Intervals: 95 %, bootstrap over seeds and "
        "problems. Output tokens count the one that ends the answer.",
        "",
        "## The stages (table 2 of the paper)",
        "",
        "| stage | right | 95 % interval | output tokens | 95 % interval |",
        "|---|---|---|---|---|",
        _row("starting student", results.before),
        *(_row(f"TwT, {name}", one) for name, one in results.stages["twt"].items()),
        "",
        _length(results),
        "",
        "![stages](stages.png)",
        "",
        "## What each part is worth (tables 1 and 7)",
        "",
        "| arm, stage | right | 95 % interval | output tokens | 95 % interval |",
        "|---|---|---|---|---|",
        *(
            _row(f"{TITLES[arm]}: {name}", one)
            for arm, stages in results.stages.items()
            for name, one in stages.items()
        ),
        "",
        "| claim | difference, points | 95 % interval | here |",
        "|---|---|---|---|",
        *(_claim(results, *one) for one in COMPARED),
        "",
        "A claim holds or fails where the interval is on one side of 0; else seeds and problems are too few to say.",
        "",
        *_data(results),
    ]
    return "\n".join(lines)


def _row(title: str, one: Measured) -> str:
    shares, tokens = bootstrap_mean(one.right), bootstrap_mean(one.tokens)
    return (
        f"| {title} | {one.right.mean():.1%} | {shares[0]:.1%} to {shares[1]:.1%} | {one.tokens.mean():.2f} | "
        f"{tokens[0]:.2f} to {tokens[1]:.2f} |"
    )


def _length(results: Results) -> str:
    got, label = results.stages["twt"]["label"].tokens.mean(), results.label_tokens
    same = "which is" if abs(got - label) < 0.05 else "which is NOT"
    return f"After the last stage an answer has {got:.2f} tokens, {same} the length of the label alone ({label:.2f})."


def _stage(results: Results, name: str) -> Measured:
    arm, stage = name.split("/")
    return results.stages[arm][stage]


def _claim(results: Results, title: str, better: str, worse: str) -> str:
    gaps = _stage(results, better).right - _stage(results, worse).right
    low, high = bootstrap_mean(gaps)
    here = "holds" if low > 0 else "fails" if high < 0 else "undecided"
    return f"| {title} | {100 * gaps.mean():+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | {here} |"


def _data(results: Results) -> list[str]:
    lines = [
        "## Teachers and data",
        "",
        f"The best single teacher is {BEST}. How long each was trained was chosen by the teachers' own answers, "
        "never by what a stage measured. Models this small do not judge themselves: the confidence is the geometric "
        "mean of the probabilities of an answer's tokens.",
        "",
        "| teacher | steps | answers | unreadable | right | confident | right of these | kept | characters each |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {STEPS[one.name]} | {one.answers} | {one.unreadable} | {one.right:.1%} | {one.above:.1%} | "
        f"{'-' if np.isnan(one.right_above) else f'{one.right_above:.1%}'} | {one.kept} | {one.characters:.1f} |"
        for one in results.teachers
    ]
    lines += ["", "Queries by the number of teachers whose answer reached the threshold:", ""]
    lines += [f"- {number} teachers: {results.survivors[number]}" for number in range(len(STEPS), -1, -1)]
    lines += ["", "| dataset | samples | right labels |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {share:.1%} |" for name, (count, share) in results.datasets.items()]
    lines += ["", "What became of the rationales that teachers were asked to rewrite, over all seeds:", ""]
    for arm, counts in results.outcomes.items():
        lines.append(f"- {arm}: " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    steps = {arm: " -> ".join(stages) for arm, (_, stages, _) in ARMS.items()}
    lines += ["", "Stages: " + "; ".join(f"{arm}: {text}" for arm, text in steps.items()) + ".", ""]
    return lines
