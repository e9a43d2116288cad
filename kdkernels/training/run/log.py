"""What a run says while it trains: metrics.jsonl, TensorBoard where it is installed, trackers, and a progress bar
(plain lines without a terminal).
"""

import importlib.util
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from kdkernels.data.jsonl import json_line
from kdkernels.training.processes import distributed
from kdkernels.training.run.atomic import append, writing
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.metrics import EVALUATION, PEAK_MEMORY, TOKENS_PER_SECOND, phases
from kdkernels.training.run.trackers import Tracker

SHOWN = ("loss", "student_entropy", "teacher_entropy", "gate", "student_length", TOKENS_PER_SECOND, PEAK_MEMORY)
RECENT = 20  # steps whose phases are shown
PLAIN_LINES = 20  # progress lines of a whole run where there is no terminal


class MetricsLog:
    """The log of a run of `steps` steps, which goes on after `last_step`.

    All processes have one, that of rank 0 writes. Its methods raise DiskError.
    """

    def __init__(self, run: RunDirectory, steps: int, last_step: int = 0, trackers: Iterable[Tracker] = ()):
        self.steps, self.active, self.trackers = steps, distributed.rank() == 0, list(trackers)
        if not self.active:
            return
        with writing(run.metrics):
            self.file = run.metrics.open("ab", buffering=0)  # what is not written is not kept for later
        self.board, self.recent = None, deque(maxlen=RECENT)
        if importlib.util.find_spec("tensorboard") is not None:
            from kdkernels.training.run.tensorboard import EventFile

            self.board = EventFile(run.tensorboard, first_step=last_step + 1 if last_step else 0)
        self.bar = tqdm(
            total=steps, initial=last_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of `step`; it outlives the process from here on. A value that is not finite is null there."""
        if not self.active:
            return
        append(self.file, json_line({"step": step} | values).encode())
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.board is not None:
            self.board.write(step, finite)
        self._try(lambda tracker: tracker.write(step, finite))
        shown = {name: f"{values[name]:.4g}" for name in SHOWN if name in values}
        if step > 0:
            self.recent.append({"step": step} | values)
            shown |= self._spent()
        self.bar.set_postfix_str("  ".join(f"{name} {value}" for name, value in shown.items()), refresh=False)
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
            with writing(Path("standard output")):
                for line in lines:
                    self.bar.write(str(line), file=sys.stdout)
                sys.stdout.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self._try(lambda tracker: tracker.close())
            if self.board is not None:
                self.board.close()

    def _try(self, action: Callable[[Tracker], None]) -> None:
        """What fails at somebody else's does not end the run, but is told, and not tried again."""
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"{tracker.name}: {type(error).__name__}: {error}: nothing more is logged there")

    def _spent(self) -> dict[str, str]:
        """The seconds of a recent step and the share of each phase, to be shown."""
        seconds = phases(self.recent)
        total = sum(seconds.values())
        if not total:
            return {}
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
        return {"seconds": f"{total / len(self.recent):.3g} ({shares})"}
