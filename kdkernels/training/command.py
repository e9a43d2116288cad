"""`kdkernels train` from the recipe on: trains or plans, and tells by its exit status how that ended."""

import sys
import traceback
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from kdkernels.errors import InputError
from kdkernels.training import distributed
from kdkernels.training.atomic import writing
from kdkernels.training.dry_run import plan
from kdkernels.training.errors import DiskError, Stopped
from kdkernels.training.exits import DISK, DIVERGED, DONE, INTERRUPTED, LOST, UNFORESEEN, UNUSABLE, end
from kdkernels.training.launcher import first
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.read import complete
from kdkernels.training.run_directory import RunDirectory
from kdkernels.training.trainer import train


def run(recipe: Config | InputError, source: str, *, resume: bool, dry_run: bool) -> int:
    """Does what the recipe says.

    Args:
        recipe: what `read_recipe` returned, or raised in this process: others may have been able to read theirs.
        source: the recipe's path, for error messages.
        resume: goes on from the newest checkpoint.
        dry_run: prints the plan instead of training.

    Returns:
        The exit status (exits.STATUSES).
    """
    status = _run(recipe, source, resume, dry_run)
    if status not in (LOST, UNFORESEEN, INTERRUPTED):  # of these, the others may know nothing yet
        distributed.leave()
    return status


def _run(recipe: Config | InputError, source: str, resume: bool, dry_run: bool) -> int:
    if not sys.stderr.isatty():
        disable_progress_bar()
    config = None
    try:
        config = _agreed(recipe, source)
        if dry_run:
            text = plan(config, resume=resume)
            with writing(Path("standard output")):
                print(text, flush=True)
        else:
            result = train(config, resume=resume)
            if first():
                with writing(Path("standard output")):
                    print(f"model: {result.final}\nreport: {RunDirectory(result.output).report}", flush=True)
    except FloatingPointError as error:
        return end(DIVERGED, error)
    except (InputError, OSError) as error:
        return end(UNUSABLE, error)
    except DiskError as error:
        return end(DISK, error)
    except (KeyboardInterrupt, Stopped) as error:
        stopped = isinstance(error, Stopped)
        text = str(error) if stopped else "interrupted"
        if config is not None and not dry_run:
            text += f"; {RunDirectory(config.run.output).way_on(config)}"
        if first():  # it is the same for all processes
            end(DONE, text)
        return DONE if stopped else INTERRUPTED
    except Exception as error:
        if distributed.lost_process(error):
            return end(
                LOST,
                "another process of the run ended, or did not answer in time ([run] timeout_seconds): "
                f"{str(error).splitlines()[0]}",
            )
        traceback.print_exc()  # Python itself would end with the status of a run that diverged
        return end(UNFORESEEN, f"an error that nobody foresaw: {type(error).__name__}: {error}")
    return DONE


def _agreed(recipe: Config | InputError, source: str) -> Config:
    """The complete recipe of all processes: where one cannot use it, all end."""
    config, error = None, recipe
    if isinstance(recipe, Config):
        try:
            config, error = complete(recipe, source), None
        except InputError as caught:
            error = caught
    if error is not None and not distributed.launched():
        raise error
    distributed.start(*([config.run.timeout_seconds] if config else []))
    distributed.agree(error)
    return config
