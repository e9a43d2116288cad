"""stages.md: what the stages of a recipe measured, a line each, as tables 2 and 3 of the paper on TwT have it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdkernels.training.evaluation import wilson
from kdkernels.training.recipe.stages import Stage
from kdkernels.training.run.atomic import write_text
from kdkernels.training.run.directory import RunDirectory

REPORT = "stages.md"


def write_stages_report(root: Path, done: Sequence[tuple[Stage, Any]]) -> None:
    """Writes the report of the stages that are trained, each with its `Result`, into their directory; only one process
    may call this. Raises DiskError.
    """
    write_text(root / REPORT, render_stages(root, done))


def render_stages(root: Path, done: Sequence[tuple[Stage, Any]]) -> str:
    """The report as Markdown."""
    lines = [f"# Stages: {root}", ""]
    rows = [_row(stage, result) for stage, result in done]
    if done and done[0][1].evaluations:
        lines += [
            "Greedy responses to the held-out prompts; output tokens count the token that ends a response.",
            "",
            "| stage | target | accuracy | 95 % interval | output tokens | ended by themselves | steps |",
            "|---|---|---|---|---|---|---|",
            _measured("before", "-", done[0][1], min(done[0][1].evaluations), 0),
            *rows,
        ]
    else:
        lines += ["| stage | target | steps |", "|---|---|---|", *rows]
    made = [stage.compression.output for stage, _ in done if stage.compression is not None]
    lines += ["", *(f"- compressed rationales: {output}" for output in made)]
    lines += [f"- {stage.name}: model {result.final}" for stage, result in done]
    return "\n".join([*lines, ""])


def _row(stage: Stage, result: Any) -> str:
    steps = len(RunDirectory(result.output).metrics.read_bytes().splitlines()) - bool(result.evaluations)
    if not result.evaluations:
        return f"| {stage.name} | {stage.target} | {steps} |"
    return _measured(stage.name, stage.target, result, max(result.evaluations), steps)


def _measured(name: str, target: str, result: Any, step: int, steps: int) -> str:
    """The line of an evaluation after `step`, whose records say how many problems there were."""
    values = result.evaluations[step]
    if "exact_match" not in values:
        return f"| {name} | {target} | not measured | | | | {steps} |"
    text = RunDirectory(result.output).evaluation(step).read_text(encoding="utf-8")
    right = [json.loads(line)["correct"] for line in text.splitlines()]
    low, high = wilson(sum(right), len(right))
    return (
        f"| {name} | {target} | {values['exact_match']:.2%} | {low:.2%} to {high:.2%} | "
        f"{values['response_tokens']:.1f} | {values['finished']:.2%} | {steps} |"
    )
