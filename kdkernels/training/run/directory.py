"""A run's directory: what it is made of and when it may be used.

config.toml              the recipe with every default filled in
inputs.json              the identities of what the run is made from
tokenizer/               the tokenizer, where the recipe trains one
metrics.jsonl            one line per step (step 0: the evaluation before training)
tensorboard/             the same numbers, where TensorBoard is installed
checkpoints/step-000123/
evaluation-000123.jsonl  one line per held-out problem, after that step
rollouts-000123.jsonl    some of what the student wrote in that step
rollout-weights/         the student's weights for an engine, while the run goes on
final/                   model and tokenizer, as transformers reads them
config-000123.toml       the recipe up to that step, where it was changed for the steps behind it (history.py)
final-000123/            the model of a run that ended there before more steps were asked for
report.md                before and after
run.lock                 the run that is at work here
"""

import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kdkernels.data.jsonl import json_line
from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import FINAL, Config
from kdkernels.training.recipe.schema import read_toml
from kdkernels.training.run import checkpoint, lock
from kdkernels.training.run.atomic import (
    UNFINISHED,
    remove,
    remove_unfinished,
    write_bytes,
    write_directory,
    write_text,
    writing,
)
from kdkernels.training.run.history import check_recipe, told_of_finished, write_config
from kdkernels.training.run.identity import TOKENIZER, Identity, check_caches, differences, identify, sources

BEGINNING = {"step": 0, "position": 0, "skipped_steps": 0, "steps_beyond_limits": 0}


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its first step (`checkpoint` None) or after a checkpoint, with that one's `progress`.

    `inputs`: the identities of what it is made from. `tokenizer`: the directory of the one that the recipe trained
    earlier, if it did.
    """

    checkpoint: Path | None
    progress: dict[str, int]
    inputs: dict[str, Identity]
    tokenizer: Path | None


class RunDirectory:
    """The paths of a run under `root`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.toml"
        self.inputs = self.root / "inputs.json"
        self.tokenizer = self.root / "tokenizer"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.final = self.root / FINAL
        self.report = self.root / "report.md"
        self.rollout_weights = self.root / "rollout-weights"

    def rollouts(self, step: int) -> Path:
        """Where some of what the student wrote in `step` is."""
        return self.root / f"rollouts-{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """Where the records of the evaluation after `step` are."""
        return self.root / f"evaluation-{step:06d}.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the directory; all processes call this together. Raises InputError naming the owner
        where another run is in it.
        """
        with ExitStack() as held:
            distributed.by_first(lambda: held.enter_context(lock.locked(self.root)))
            yield

    def find_start(self, config: Config, resume: bool, asked: Collection[str] = ()) -> Start:
        """Where the run begins, all that it is made from being what it was; all processes call this together, and
        nothing is written.

        asked: keys of the recipe that were asked for by name, of which those in `history.CHANGEABLE` may be others than
        those of the run.

        To resume where nothing is there yet is to begin. Raises InputError where a new run would write into an old one,
        where a resumed one has another recipe or is made from anything else than the interrupted one, and where no
        checkpoint can be read.
        """
        distributed.by_first(lambda: self._check(config, resume, asked))
        found = checkpoint.newest_sound(self.checkpoints) if resume else None
        return distributed.by_first(lambda: self._start(config, resume, found))

    def check_resolved(self, config: Config, start: Start, asked: Collection[str] = ()) -> None:
        """What `find_start` checked of a resumed run, of the recipe with the steps of its epochs; all processes call
        this together. Raises InputError, also where more steps are trained than it has.
        """

        def check() -> None:
            if start.checkpoint is not None:
                check_recipe(self.config, config, asked)
            if start.progress["step"] > config.train.steps:
                raise InputError(
                    f"--resume: [train] steps: expected at least {start.progress['step']}, which are trained in "
                    f"{start.checkpoint}, got {config.train.steps}"
                )

        distributed.by_first(check)

    def check(self, config: Config) -> None:
        """Raises InputError where the run can neither be begun here nor be the one that is here, at its end or on its
        way; all processes call this together.
        """
        distributed.by_first(lambda: self._check(config, resume=self.config.is_file()))

    def is_finished(self, config: Config, asked: Collection[str] = ()) -> bool:
        """Whether the run has come to its end, and no other one is `asked` for; all processes call this together.

        Raises InputError where it has, but was one of another recipe or made from anything else than there is now.
        """

        def check() -> bool:
            if not (self.config.is_file() and self.final.is_dir()):
                return False
            if check_recipe(self.config, config, asked):
                return False
            self._identities(config, _read_json(self.inputs))
            return True

        return distributed.by_first(check)

    def nothing_left(self, config: Config) -> str:
        """What is said where the run has come to its end and `config` asks for no more steps."""
        return f"{self.root}: the run is finished, nothing is left to do{told_of_finished(self.config, config)}"

    def remove_left_overs(self) -> None:
        """Deletes what a killed run did not write or delete to its end; all processes call this together."""

        def remove() -> None:
            for directory in (self.root, self.checkpoints):
                with writing(directory):
                    remove_unfinished(directory)

        distributed.by_first(remove)

    def create(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Identity]
    ) -> dict[str, Identity]:
        """Writes what there is of a run before its first step; all processes call this together. The identities of
        everything it is made from, the tokenizer that the recipe trained among them. Raises DiskError.
        """
        trained = config.tokenizer.kind is not None
        distributed.by_first(lambda: write_config(self.config, config, step=0))  # from here on there is a run
        if trained:
            write_directory(self.tokenizer, lambda path: _save_tokenizer(tokenizer, path))

        def complete() -> dict[str, Identity]:
            known = inputs | (identify({TOKENIZER: str(self.tokenizer)}) if trained else {})
            write_text(self.inputs, json.dumps(known, indent=1))
            return known

        return distributed.by_first(complete)

    def go_on(self, config: Config, step: int) -> None:
        """Makes `config` the run's recipe from `step` on; all processes call this together. A model that an end without
        the steps asked for now has left stays, under another name. Raises DiskError.
        """

        def change() -> None:
            if self.final.is_dir():
                earlier = self.root / f"{FINAL}-{read_toml(self.config)['train']['steps']:06d}"
                with writing(earlier):
                    remove(earlier)
                    self.final.rename(earlier)
            write_config(self.config, config, step)

        distributed.by_first(change)

    def restore_log(self, kept: Path | None) -> None:
        """Makes metrics.jsonl what it was when the checkpoint `kept` was written, or nothing: what came after it is
        trained again; all processes call this together. A log that was damaged or cut is repaired with a warning.
        Raises DiskError.
        """

        def restore() -> None:
            log = b"" if kept is None else (kept / checkpoint.METRICS).read_bytes()
            if log and not (self.metrics.is_file() and self.metrics.read_bytes().startswith(log)):
                warnings.warn(f"{self.metrics} was damaged: its lines are put back from {kept}", stacklevel=2)
            write_bytes(self.metrics, log)

        distributed.by_first(restore)

    def way_on(self) -> str:
        """How a run that did not come to its end goes on, in words."""
        there = checkpoint.complete(self.checkpoints)
        if not self.config.is_file():
            return "start the run again: nothing was trained yet"
        recipe = read_toml(self.config)
        if not there and recipe["checkpoint"]["every"] == 0:
            return "--resume starts from the beginning, as [checkpoint] every = 0 asked for no checkpoints"
        if not there:
            return "--resume starts from the beginning, as there is no checkpoint yet"
        if checkpoint.step(there[-1]) == recipe["train"]["steps"]:
            return f"--resume writes {self.final}: all steps are trained, and are in {there[-1]}"
        return f"--resume goes on from {there[-1]}"

    def write_records(self, path: Path, records: Iterable[dict[str, Any]]) -> None:
        """Makes `records` the lines of the file `path`; all processes call this together. Raises DiskError."""
        distributed.by_first(lambda: write_text(path, "".join(map(json_line, records))))

    def _check(self, config: Config, resume: bool, asked: Collection[str] = ()) -> None:
        """Raises InputError where the directory is not that of an unfinished run of this recipe, or not free."""
        here = f"{self.root} is not empty"
        if resume and self.config.is_file():
            check_recipe(self.config, config, asked)
        elif self.config.is_file() and self.final.is_dir():
            raise InputError(
                f"[run] output: {here}, it holds a finished run with its model in {self.final}: give another directory"
            )
        elif self.config.is_file():
            raise InputError(
                f"[run] output: {here}, it holds a run that did not end: continue it with --resume, or give another "
                "directory"
            )
        elif self.root.exists() and any(not _left_over(path) for path in self.root.iterdir()):
            raise InputError(f"[run] output: {here}, and what it holds is no run: give another directory")

    def _start(self, config: Config, resume: bool, found: tuple[Path, checkpoint.Contents] | None) -> Start:
        began_with, progress = None, BEGINNING
        if found is not None:
            began_with, progress = found[1].inputs, BEGINNING | found[1].progress
        elif resume and self.final.is_dir():
            raise InputError(
                f"--resume: the run in {self.root} is finished and kept no checkpoint from which it could go on: start "
                f"another run, from its model in {self.final} ([student] path)"
            )
        elif resume:
            missing = "checkpoint" if self.config.is_file() else "run"
            warnings.warn(f"--resume: no {missing} yet in {self.root}: the run starts from its beginning", stacklevel=2)
            began_with = _read_json(self.inputs) if self.inputs.is_file() else None
        inputs, tokenizer = self._identities(config, began_with)
        return Start(found and found[0], progress, inputs, tokenizer)

    def _identities(
        self, config: Config, began_with: dict[str, Identity] | None
    ) -> tuple[dict[str, Identity], Path | None]:
        """The identities of what the run is made from, which must be those that it `began_with`, and the directory of
        the tokenizer that it trained earlier, if it did. Raises InputError.
        """
        kept = config.tokenizer.kind is not None and began_with is not None
        if kept and not self.tokenizer.is_dir():
            raise InputError(
                f"--resume: {self.tokenizer} is missing, the tokenizer that the run trained: put it back, or start a "
                "new run in another directory"
            )
        places = sources(config, self.tokenizer if kept else None)
        inputs = identify(places)
        check_caches(config, inputs)
        changes = [] if began_with is None else differences(began_with, inputs, places)
        if changes:
            raise InputError(
                f"--resume: the run in {self.root} was made from something else: {'; '.join(changes)}. Put back what "
                "it began with, or start a new run in another directory"
            )
        return inputs, self.tokenizer if kept else None


def _left_over(path: Path) -> bool:
    """Whether a run that was killed before it had begun may have left `path`."""
    return path.name == lock.NAME or path.name.startswith(UNFINISHED)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if distributed.rank() == 0:
        tokenizer.save_pretrained(directory)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problem = "expected an object"
    except (OSError, ValueError, RecursionError) as error:
        problem = error
    raise InputError(f"--resume: {path} is damaged: {problem}: give the run another directory")
