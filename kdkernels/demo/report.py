"""The demo's report in Markdown: how often each arm is right, how far arms differ, and what everything cost."""

import platform
from collections.abc import Iterable

import torch

from kdkernels.demo.markdown import count, table
from kdkernels.demo.phases import PROBLEMS, STUDENTS
from kdkernels.demo.results import Arm
from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.training.evaluation import wilson

COMPARISONS = (  # (arm, the arm it is compared with)
    ("teacher", "student"),
    ("sft", "student"),
    ("gkd", "student"),
    ("gkd", "sft"),
    ("tsd-kd-scaled", "sft"),
    ("tsd-kd-scaled", "gkd"),
    ("tsd-kd", "student"),
    ("sft-new", "gkd"),
    ("strong-sft", "strong-student"),
    ("strong-gkd", "strong-student"),
    ("strong-tsd-kd", "strong-student"),
    ("strong-tsd-kd", "strong-gkd"),
)
MARGIN = 0.20  # by which the teacher must beat the starting student for a demo that shows something


def render(arms: Iterable[Arm], seconds: float, cores: int) -> str:
    """The report of a demo that took `seconds` on `cores` cores."""
    by_name = {arm.phase.name: arm for arm in arms}
    seeds, problems = by_name[STUDENTS[0].name].right.shape
    return "\n".join(
        [
            "# Distilling a small student: the demo's report",
            "",
            f"{problems} held-out problems, {count(seeds, 'seed')}, {seconds:.0f} seconds in all on "
            f"{count(cores, 'core')} ({platform.machine()}, torch {torch.__version__}).",
            "",
            "## Exact match on held-out problems",
            "",
            *_accuracies(by_name, seeds),
            "",
            "![accuracy](accuracy.png)",
            "",
            "## Differences",
            "",
            *_differences(by_name, seeds),
            "",
            *_checks(by_name),
            "",
            "![curves](curves.png)",
            "",
            *_caveats(by_name),
            "",
            "## Seconds and memory",
            "",
            *_costs(by_name.values(), cores),
            "",
        ]
    )


def interval(arm: Arm) -> tuple[float, float]:
    """The 95 % interval of an arm's accuracy: over problems (Wilson), and over seeds where there are several."""
    if len(arm.right) == 1:
        return wilson(int(arm.right.sum()), arm.right.size)
    return bootstrap_mean(arm.right.astype(float))


def difference(arm: Arm, other: Arm) -> tuple[float, tuple[float, float]]:
    """Accuracy of `arm` minus that of `other`, with its paired-bootstrap 95 % interval."""
    gaps = arm.right.astype(float) - other.right.astype(float)  # the teacher's one row serves every seed
    return float(gaps.mean()), bootstrap_mean(gaps)


def _accuracies(arms: dict[str, Arm], seeds: int) -> list[str]:
    columns = ["exact match", "95 % interval", *(["each seed"] if seeds > 1 else []), "finished"]
    columns += ["steps", "response tokens", "solutions"]
    rows = []
    for arm in arms.values():
        each = " ".join(f"{100 * share:.1f}" for share in arm.right.mean(axis=1))
        cells = [f"{100 * arm.accuracy():.1f} %", _range(interval(arm), ""), *([each] if seeds > 1 else [])]
        cells += [f"{100 * arm.finished.mean():.1f} %", len(arm.steps[0]), f"{arm.tokens():.0f}"]
        rows.append([arm.phase.title, *cells, PROBLEMS[arm.phase.solutions] if arm.phase.solutions else "none"])
    over = "problems (Wilson)" if seeds == 1 else "seeds and problems (bootstrap)"
    return [
        *table(["arm", *columns], rows),
        "",
        f"Intervals are over {over}. Finished: responses that ended with the end-of-sequence token. Response tokens: "
        "those trained on, prompts not counted. Solutions: worked solutions the arm learnt from. The arms below a "
        "student start from it; those of the strong student have a tenth of the learning rate.",
    ]


def _differences(arms: dict[str, Arm], seeds: int) -> list[str]:
    rows = []
    for name, other in COMPARISONS:
        mean, (low, high) = difference(arms[name], arms[other])
        reading = "better" if low > 0 else "worse" if high < 0 else "undecided"
        titles = f"{arms[name].phase.title} - {arms[other].phase.title}"
        rows.append([titles, f"{100 * mean:+.1f}", _range((low, high), "+"), reading])
    over = "problems" if seeds == 1 else "seeds and problems"
    return [
        *table(["difference", "points", "95 % interval", "reading"], rows),
        "",
        f"Paired bootstrap over {over}.",
    ]


def _checks(arms: dict[str, Arm]) -> list[str]:
    """Orderings that held on every seed while the task was designed; levels are not among them."""
    accuracy = {name: arm.accuracy() for name, arm in arms.items()}
    checks = {
        "the teacher is at least 20 points better than the starting student": accuracy["teacher"]
        >= accuracy["student"] + MARGIN,
        "GKD is better than continued SFT": accuracy["gkd"] > accuracy["sft"],
        "TSD-KD with scaled weights is better than continued SFT": accuracy["tsd-kd-scaled"] > accuracy["sft"],
    }
    return [
        "Expected of this task:",
        "",
        *(f"- {text}: {'yes' if holds else '**NO**'}" for text, holds in checks.items()),
    ]


def _caveats(arms: dict[str, Arm]) -> list[str]:
    share = {name: f"{100 * arm.accuracy():.1f} %" for name, arm in arms.items()}
    weak = f"from {share['student']} to {share['tsd-kd']}"
    strong = f"from {share['strong-student']} to {share['strong-tsd-kd']}"
    return [
        "## What this shows, and what it cannot",
        "",
        "- The whole path works: a student of another width, with another padded vocabulary, learns from a teacher's "
        "distributions over responses that it samples itself.",
        "- GKD and TSD-KD read no solution of the new problems. Where such solutions exist, plain SFT on them "
        f"({share['sft-new']} here) is what they have to beat: their claim is new prompts without new labels.",
        "- TSD-KD's published weights were chosen for pretrained students of 1.5 billion parameters at a rate of "
        "5e-6. Here the indirect term, a sum of ranking losses over a vocabulary with few plausible tokens, is far "
        f"larger than the direct one. With them the weak student (rate 2e-3) went {weak}, the strong one (2e-4) "
        f"{strong}. With the other two terms scaled down, what is left is a gated GKD. None of this tells which method "
        "is better for language models.",
        "- One task, one architecture, a vocabulary of a few hundred tokens. Intervals over problems alone (one seed) "
        "do not tell how much another starting student would change: `make demo SEEDS=5` does.",
    ]


def _costs(arms: Iterable[Arm], cores: int) -> list[str]:
    parts = ("rollout", "teacher", "student", "loss", "optimizer")
    rows = []
    for arm in arms:
        seconds = sum(cost.seconds for cost in arm.costs) / len(arm.costs)
        spent = [f"{arm.seconds(part):.1f}" for part in parts]
        rows.append([arm.phase.name, f"{seconds:.0f}", *spent, f"{max(cost.peak for cost in arm.costs):.0f}"])
    return [
        *table(["phase", "seconds", *parts, "peak MiB"], rows),
        "",
        "Seconds of the whole process, start-up and evaluation included, and of the parts of its steps; means over the "
        f"seeds. The teacher has the machine to itself; the others run side by side, up to {cores} at a time.",
    ]


def _range(bounds: tuple[float, float], sign: str) -> str:
    return " to ".join(f"{100 * bound:{sign}.1f}" for bound in bounds)
