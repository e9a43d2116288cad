"""`kdkernels train` from the recipe on: trains or plans, and tells by its exit status how that ended."""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from kdkernels.engine.gpu import CARDS, Gpu
from kdkernels.errors import InputError
from kdkernels.training.dry_run import Machine, plan
from kdkernels.training.errors import Stopped
from kdkernels.training.offline.rollout import rollout
from kdkernels.training.processes import distributed
from kdkernels.training.processes.exits import DONE, INTERRUPTED, LOST, UNFORESEEN, end, status_of
from kdkernels.training.processes.launcher import first
from kdkernels.training.recipe.extends import lineage
from kdkernels.training.recipe.stages import Stage
from kdkernels.training.run.atomic import writing
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.stages import REPORT
from kdkernels.training.stages import Compressor, completed, train_stages
from kdkernels.training.trainer import Result, train

BEFORE = {"rollout": rollout}  # what is done before training, by its command: (recipe) -> what there is now, in words


@dataclass(frozen=True)
class DryRun:
    """`machine`: plans for that one, instead of for this. `save`: a file for what is printed."""

    machine: Machine | None = None
    save: Path | None = None


def machine(card: str, gpus: int) -> Machine:
    """So many GPUs of a name in engine/gpu.py's CARDS. Raises InputError."""
    if card not in CARDS:
        known = ", ".join(f"{name} ({memory / 1e9:.0f} GB)" for name, (*_, memory) in CARDS.items())
        raise InputError(f"--gpu: expected one of {known}, got {card!r}")
    return Machine(Gpu.named(card), gpus)


def run(
    recipes: list[Stage] | InputError,
    *,
    resume: bool,
    asked: Sequence[str] = (),
    dry_run: DryRun | None = None,
    compressor: Compressor | None = None,
    before: str | None = None,
) -> int:
    """Does what the recipes say.

    Args:
        recipes: what `read_recipes` returned, or raised in this process: others may have been able to read theirs.
        resume: goes on from the newest checkpoint, as stages do in any case.
        asked: the keys that were set by name, which may be others than those of the one run that is resumed.
        dry_run: prints the plan of the one recipe instead of training; what is asked of it.
        compressor: what makes the data of stages of compressed rationales.
        before: makes what the one recipe needs before it trains, instead of training: one of BEFORE.

    Returns:
        The exit status (exits.STATUSES).
    """
    if not sys.stderr.isatty():
        disable_progress_bar()
    status = _run(recipes, resume, asked, dry_run, compressor, before)
    if status not in (LOST, UNFORESEEN, INTERRUPTED):  # of these, the others may know nothing yet
        distributed.leave()
    return status


def _run(
    recipes: list[Stage] | InputError,
    resume: bool,
    asked: Sequence[str],
    dry_run: DryRun | None,
    compressor: Compressor | None,
    before: str | None,
) -> int:
    stages = []
    try:
        stages = _agreed(recipes)
        if dry_run:
            text = "\n\n".join(_plan(stage, resume, dry_run.machine, asked) for stage in stages)
            if first():
                if dry_run.save is not None:
                    _save(text, dry_run.save)
                with writing(Path("standard output")):
                    print(text, flush=True)
        elif before:
            _make(before, stages)
        else:
            alone = len(stages) == 1 and stages[0].root is None
            results = [train(stages[0].config, resume, changes=asked)] if alone else train_stages(stages, compressor)
            if first():
                _tell(stages, results)
    except (KeyboardInterrupt, Stopped) as error:
        stopped = isinstance(error, Stopped)
        text = str(error) if stopped else "interrupted"
        if before:
            text += "; the same command goes on"
        elif stages and not dry_run:
            text += f"; {_way_on(stages)}"
        if first():  # it is the same for all processes
            end(DONE, text)
        return DONE if stopped else INTERRUPTED
    except Exception as error:
        if status_of(error) is not None:
            return end(status_of(error), error)
        if distributed.lost_process(error):
            return end(
                LOST,
                "another process of the run ended, or did not answer in time ([run] timeout_seconds): "
                f"{str(error).splitlines()[0]}",
            )
        traceback.print_exc()  # Python itself would end with the status of a run that diverged
        return end(UNFORESEEN, f"an error that nobody foresaw: {type(error).__name__}: {error}")
    return DONE


def _tell(stages: Sequence[Stage], results: Sequence[Result]) -> None:
    """Where all is that came of it."""
    with writing(Path("standard output")):
        for result in results:
            print(f"model: {result.final}\nreport: {RunDirectory(result.output).report}", flush=True)
        for root in dict.fromkeys(stage.root for stage in stages if stage.root is not None):
            print(f"stages: {Path(root) / REPORT}", flush=True)


def _make(before: str, stages: Sequence[Stage]) -> None:
    if len(stages) > 1:
        raise InputError(f"{before}: expected a recipe without stages, got one of {len(stages)}")
    made = BEFORE[before](stages[0].config)
    if first():
        with writing(Path("standard output")):
            print("\n".join(made), flush=True)


def _save(text: str, path: Path) -> None:
    try:
        with path.open("x", encoding="utf-8") as file, writing(path):
            file.write(text + "\n")
    except FileExistsError as error:
        raise InputError(f"--save {path}: expected a file that is not there yet, got one") from error
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written: {error.strerror}") from error


def _plan(stage: Stage, resume: bool, machine: Machine | None, asked: Sequence[str]) -> str:
    """The plan of one training; of one of several in a file, as if it began with what the first one begins with."""
    text = plan(stage.config, resume=resume, recipes=lineage(stage.path), machine=machine, asked=asked)
    if stage.name is None:
        return text
    title = f"# stage {stage.name}: target {stage.target}"
    if stage.compression is not None:
        title += f", its rationales rewritten (planned with those of {stage.compression.source})"
    return f"{title}\n{text}"


def _way_on(stages: Sequence[Stage]) -> str:
    """How the first of the runs that did not come to its end goes on."""
    runs = [RunDirectory(stage.config.run.output) for stage in stages]
    return next((run for run in runs if not run.final.is_dir()), runs[-1]).way_on()


def _agreed(recipes: list[Stage] | InputError) -> list[Stage]:
    """The complete recipes of all processes: where one cannot use them, all end."""
    stages, error = [], recipes
    if not isinstance(recipes, InputError):
        try:
            stages, error = completed(recipes), None
        except InputError as caught:
            error = caught
    if error is not None and not distributed.launched():
        raise error
    distributed.start(*[stage.config.run.timeout_seconds for stage in stages[:1]])
    distributed.agree(error)
    return stages
