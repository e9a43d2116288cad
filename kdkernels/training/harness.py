"""`kdkernels eval --lm-eval`: the tasks of lm-evaluation-harness, where it is installed."""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training.recipe.resolve import adapter_base
from kdkernels.training.recipe.schema import refuse_unknown

# Lists of tasks by name, each task with its examples in the prompt (None: as many as the task itself has).
LISTS: dict[str, dict[str, int | None]] = {
    # TSD-KD (arXiv 2603.13260), section 4.1 and appendix A.10, which names the shots and the harness
    "tsd-kd": {
        "gsm8k": 5,
        "gsm_plus": 5,
        "minerva_math": 4,  # MATH
        "mmlu_pro_math": 5,
        "mmlu_stem": 5,
        "sciq": 0,
        "mbpp": 0,
        "bbh": 3,
        "leaderboard_musr": 0,
        "ifeval": 0,
    },
    # VCRD (arXiv 2605.04078), sections 4.1 and 4.2, which do not name the harness
    "vcrd-math": {"gsm8k": None, "minerva_math": None, "agieval_sat_math": None, "aime24": None},  # MATH, SAT-Math
    "vcrd-code": {"humaneval": None, "humaneval_plus": None, "mbpp": None, "mbpp_plus": None},
}
# Of the papers' tasks, those that the harness (0.4.13) has not. Its minerva_math is MATH with Minerva's prompts; VCRD's
# Minerva is other problems (math-ai/minervamath).
LACKING = {"vcrd-math": "SVAMP, Minerva, Gaokao2023-EN, OlympiadBench, CMATH, AMC23"}
RUNS_CODE = ("mbpp", "humaneval")  # how the names begin of tasks that run what the model writes


def tasks(text: str, run_code: bool) -> dict[str, int | None]:
    """The tasks of a list's name, or of names with commas between them.

    Raises:
        InputError: one of them runs what the model writes, and nobody said that it may.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"--lm-eval: expected {', '.join(LISTS)}, or tasks with commas between them, got {text!r}")
    chosen = LISTS.get(text) or dict.fromkeys(names)
    unsafe = [name for name in chosen if name.startswith(RUNS_CODE)]
    if unsafe and not run_code:
        rest = ",".join(name for name in chosen if name not in unsafe)
        raise InputError(
            f"--lm-eval: {', '.join(unsafe)}: code that the model writes would be run on this machine: add --run-code "
            f"where that is safe{f', or leave them out: --lm-eval {rest}' if rest else ''}"
        )
    return chosen


def harness() -> ModuleType:
    """The package. Raises MissingPackage."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        needed = f"--lm-eval needs {error.name}: pip install kdkernels[lm-eval]"
        raise MissingPackage(needed) from error
    return lm_eval


def measure(model: str, chosen: dict[str, int | None], output: Path, options: argparse.Namespace) -> str:
    """Runs the tasks with the command's options, and writes all that the harness says about them to `output`, as JSON.

    Returns:
        A table of the results, as Markdown; those of a group's members are in the file alone. And what a list lacks.

    Raises:
        InputError: the harness has no such task, or `output` cannot be written. MissingPackage.
    """
    package = harness()
    refuse_unknown(chosen, package.tasks.TaskManager().all_tasks, "--lm-eval:", "task")
    if options.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # which the metric of these tasks asks for as well
    by_shots, found = defaultdict(list), {}
    for task, shots in chosen.items():
        by_shots[shots].append(task)
    for shots, names in by_shots.items():
        answer = package.simple_evaluate(
            model="hf",
            model_args={"dtype": options.dtype or "auto"} | _pretrained(model),
            tasks=names,
            num_fewshot=shots,
            batch_size=options.batch_size,
            limit=options.limit,
            apply_chat_template=options.chat,
            confirm_run_unsafe_code=options.run_code,
            log_samples=False,
        )
        if answer is not None:  # as it is on all processes but the first
            found |= {**answer["results"], **answer.get("groups", {})}
            _write(output, {"model": model, "results": found})
    lacking = LACKING.get(options.lm_eval)
    more = f"\n\nof the paper's tasks, not in lm-evaluation-harness: {lacking}" if lacking else ""
    return _table({task: found.get(task, {}) for task in chosen}) + more


def _pretrained(model: str) -> dict[str, str]:
    base = adapter_base(model)
    return {"pretrained": base, "peft": model} if base else {"pretrained": model}


def _write(path: Path, contents: dict) -> None:
    try:
        path.write_text(json.dumps(contents, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written: {error.strerror}") from error


def _table(results: dict[str, dict]) -> str:
    lines = ["| task | metric | value | standard error |", "|---|---|---|---|"]
    for task, values in results.items():
        metrics: Sequence[str] = [
            name for name, value in values.items() if isinstance(value, float) and "_stderr" not in name
        ]
        for name in metrics:
            metric, _, how = name.partition(",")
            error = values.get(f"{metric}_stderr,{how}")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            lines.append(f"| {task} | {name.removesuffix(',none')} | {values[name]:.4f} | {shown} |")
        if not metrics:
            lines.append(f"| {task} | none | | |")
    return "\n".join(lines)
