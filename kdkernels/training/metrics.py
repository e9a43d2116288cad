"""What a run says while it trains: metrics.jsonl, TensorBoard where it is installed, and a progress bar (plain lines
without a terminal).
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from kdkernels.training import distributed
from kdkernels.training.atomic import write_text
from kdkernels.training.jsonl import json_line
from kdkernels.training.run import RunDirectory

SHOWN = ("loss", "student_entropy", "teacher_entropy", "gate", "tokens_per_second")
EVALUATION = "evaluation/"  # what an evaluation measured is logged under this prefix
PLAIN_LINES = 20  # progress lines of a whole run where there is no terminal


class MetricsLog:
    """The log of a run up to `steps`; one that goes on after `last_step` forgets what an interrupted run logged beyond
    it.

    All processes have one, that of rank 0 writes.
    """

    def __init__(self, run: RunDirectory, steps: int, last_step: int | None = None):
        self.steps, self.active = steps, distributed.rank() == 0
        if not self.active:
            return
        if last_step is not None:
            _cut_after(run.metrics, last_step)
        self.file = run.metrics.open("a", encoding="utf-8")
        self.board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.tensorboard), purge_step=None if last_step is None else last_step + 1)
        self.bar = tqdm(
            total=steps, initial=last_step or 0, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of `step`; it outlives the process from here on. A value that is not finite is null there."""
        if not self.active:
            return
        self.file.write(json_line({"step": step} | values))
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self.board.add_scalar(name, value, step)
        shown = {name: f"{values[name]:.4g}" for name in SHOWN if name in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        evaluated = {name: f"{value:.4g}" for name, value in values.items() if name.startswith(EVALUATION)}
        plain = (
            self.bar.disable and step > 0 and (step == self.steps or step % math.ceil(self.steps / PLAIN_LINES) == 0)
        )
        for part in (shown if plain else {}, evaluated):
            if part:
                self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value}" for name, value in part.items()))

    def say(self, *lines: object) -> None:
        """Lines for people, beside the progress bar."""
        if self.active:
            for line in lines:
                self.bar.write(str(line), file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Flushes metrics.jsonl to the disk: no checkpoint may be newer than the log."""
        if self.active:
            os.fsync(self.file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board is not None:
                self.board.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The complete lines of a metrics.jsonl, in order, without a last one that an interrupted run left unfinished. None
    is a number that was not finite.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def evaluations(path: Path) -> dict[int, dict[str, float | None]]:
    """The evaluations in a metrics.jsonl, by step. None is a number that was not finite."""
    lines = {
        line["step"]: {
            name.removeprefix(EVALUATION): value for name, value in line.items() if name.startswith(EVALUATION)
        }
        for line in read_metrics(path)
    }
    return {step: values for step, values in lines.items() if values}


def _cut_after(path: Path, step: int) -> None:
    """Drops the lines of the steps after `step`, which are about to be trained again."""
    kept = [json_line(line) for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(kept))
