"""The demo of a language model from beginning to end: models, answers, arms, what the loss takes, report.

Whatever is finished stays: a demo that was interrupted goes on where it was.
"""

import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kdkernels.data.records import records
from kdkernels.demo.lm.answers import answer, read
from kdkernels.demo.lm.phases import ARMS, RECIPES, settings
from kdkernels.demo.lm.plots import plot_curves, plot_held_out, plot_step_cost
from kdkernels.demo.lm.pretrained import pretrained
from kdkernels.demo.lm.prompts import prompts
from kdkernels.demo.lm.report import Found, render
from kdkernels.demo.lm.results import load_result
from kdkernels.demo.lm.samples import sample
from kdkernels.demo.lm.shorten import without_layers
from kdkernels.errors import InputError
from kdkernels.training import load_config, train
from kdkernels.training.processes import distributed
from kdkernels.training.run.atomic import remove, write_text
from kdkernels.training.run.directory import RunDirectory

DROPPED = range(12, 18)  # layers of the teacher that the student does not have


@dataclass(frozen=True)
class Settings:
    """What a demo is made of.

    data: JSON lines with the field `prompt` (a text), in place of our own prompts. train, held_out: prompts of each
    kind, of which those with an answer within `longest` tokens are used. samples: held-out prompts that every model
    answers for the report. overrides: for every training. dropped: layers.
    """

    data: Path | None = None
    train: int = 288
    held_out: int = 64
    longest: int = 48
    samples: int = 6
    overrides: tuple[str, ...] = ()
    dropped: Sequence[int] = DROPPED


def run_demo(output: Path, chosen: Settings = Settings()) -> tuple[Path, list[str]]:
    """Runs what is not finished yet below `output`: the path of the report, and what did not come out as it has to.

    A teacher that is in `output`/models/teacher already is taken as it is.

    Raises:
        InputError: data that cannot be used, or an `output` of a demo with other settings.
        MissingPackage: the teacher's package is not installed.
        RuntimeError, FloatingPointError, DiskError, Stopped: as a training, or the measurement of the loss.
    """
    if not RECIPES.is_dir():
        raise InputError(f"no recipes in {RECIPES}: run the demo from a clone of the repository")
    distributed.start()
    models, data, stages = output / "models", output / "data", Stages(output)
    asked = {side: _prompts(side, chosen) for side in ("test", "train")}
    _check_same(output, asked, chosen)
    with stages("models"):
        teacher = pretrained(models / "teacher")
        student = without_layers(teacher, chosen.dropped, models / "student")
    with stages("answers"):
        for name, side in (("held-out", "test"), ("train", "train")):
            answer(teacher, asked[side], chosen.longest, data / f"{name}-parts", data / f"{name}.jsonl")
    with stages("arms"):
        _train(output, chosen.overrides)
    with stages("samples"):
        shown = [line["messages"][0]["content"] for line in read(data / "held-out.jsonl")[: chosen.samples]]
        all_models = {"teacher": teacher, "start": student}
        all_models |= {arm.name: RunDirectory(output / arm.name).final for arm in ARMS}
        samples = sample(all_models, shown, chosen.longest, output / "samples")
    with stages("step cost"):
        costs = _step_cost(output, teacher, student)
    results = [load_result(arm, output / arm.name) for arm in ARMS]
    plot_held_out(results, output / "held-out.png")
    plot_curves(results, output / "curves.png")
    plot_step_cost(costs["costs"], output / "step-cost.png")
    layers = tuple(json.loads((one / "config.json").read_text())["num_hidden_layers"] for one in (teacher, student))
    report = output / "report.md"
    write_text(report, render(Found(results, costs, shown, samples, stages.seconds, layers)))
    failed = [result.arm.title for result in results if result.arm.must_learn and not result.learnt()]
    return report, failed


class Stages:
    """Seconds of every stage, of all starts of the demo in `output` together."""

    def __init__(self, output: Path):
        self.file = output / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            write_text(self.file, json.dumps(self.seconds))


def _prompts(side: str, chosen: Settings) -> list[str]:
    """Those of one side: of a user's file, the first are held out, and those behind them are trained on; none twice."""
    wanted = chosen.held_out if side == "test" else chosen.train
    if chosen.data is None:
        return list(islice(prompts(side), wanted))
    texts = []
    for number, record in records(str(chosen.data)):
        text = record.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{chosen.data}, line {number}: expected a text in the field 'prompt', got {text!r}")
        texts.append(text)
    texts = list(dict.fromkeys(texts))
    if len(texts) <= chosen.held_out:
        raise InputError(
            f"{chosen.data}: expected more than {chosen.held_out} different prompts, of which so many are held out, "
            f"got {len(texts)}"
        )
    start = 0 if side == "test" else chosen.held_out
    return texts[start : start + wanted]


def _check_same(output: Path, asked: dict[str, list[str]], chosen: Settings) -> None:
    """Raises InputError where the demo in `output` is one of other prompts or limits, whose answers would be taken."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "settings.json"
    own = {f"{side} prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest() for side, texts in asked.items()}
    own |= {"longest": chosen.longest, "samples": chosen.samples, "dropped": [*chosen.dropped]}
    old = json.loads(file.read_text()) if file.is_file() else own
    different = next((name for name in own if old.get(name) != own[name]), None)
    if different:
        raise InputError(f"--output {output}: holds a demo with other {different}: give another directory")
    write_text(file, json.dumps(own))


def _train(output: Path, overrides: Sequence[str]) -> None:
    """All arms, one after another; the checkpoints of one that is finished go, a gigabyte and more."""
    for arm in ARMS:
        run = RunDirectory(output / arm.name)
        train(load_config(arm.recipe, settings(arm, output, overrides)), resume=run.config.is_file())
        remove(run.checkpoints)
        gc.collect()  # an engine refers to itself: this arm's would stay in memory beside the next one's


def _step_cost(output: Path, teacher: Path, student: Path) -> dict:
    file = output / "step-cost.json"
    if not file.is_file():
        command = [sys.executable, "-m", "kdkernels.demo.lm.step_cost"]
        where = [output / "data" / "train.jsonl", teacher, student, file]
        status = subprocess.run([*command, *map(str, where)], env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode
        if status:
            raise RuntimeError(f"step_cost: exit status {status}")
    return json.loads(file.read_text(encoding="utf-8"))
