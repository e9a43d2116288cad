"""`kdkernels export`: a checkpoint of a run as a model, like the one that the run's end leaves in final/."""

from functools import partial
from pathlib import Path

import torch

from kdkernels.errors import InputError
from kdkernels.training.deepspeed_strategy import saved_weights
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.models.saving import save_model
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.read import complete, parse_recipe
from kdkernels.training.run import checkpoint
from kdkernels.training.run.atomic import write_directory
from kdkernels.training.run.directory import RunDirectory


def export(source: Path, directory: Path) -> None:
    """Writes the student of the checkpoint at `source`, RUN/checkpoints/step-000123, into `directory`, with its
    tokenizer. One process does it, however many have written the checkpoint.

    Raises:
        InputError: `source` is no sound checkpoint in the directory of its run, the models that the run started from
            are not there, or there is something at `directory`.
        DiskError: what the disk did not take.
    """
    distributed.start()
    run = _run_of(source)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not empty: give another directory")
    shared, own = checkpoint.states(source)
    config = complete(parse_recipe(run.config), str(run.config))
    tokenizer = load_tokenizer(config, run.tokenizer if config.tokenizer.kind is not None else None)
    student = load_student(config, tokenizer).to(getattr(torch, config.run.dtype))
    weights = saved_weights(student, shared, own)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    try:
        others = student.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # of other shapes
        raise InputError(
            f"{source} is not of the recipe in {run.config}: {' '.join(str(error).split()[:30])}"
        ) from error
    if others or trained - weights.keys():
        name = min([*others, *(trained - weights.keys())])
        raise InputError(f"{source} is not of the recipe in {run.config}: {name} is in one of them alone")
    write_directory(directory, partial(save_model, config, student, student.state_dict(), tokenizer))


def _run_of(source: Path) -> RunDirectory:
    """The run whose checkpoint is at `source`."""
    run = RunDirectory(source.absolute().parent.parent)
    if (source / checkpoint.PROGRESS).is_file() and run.config.is_file():
        return run
    there = checkpoint.complete(RunDirectory(source).checkpoints)
    if there:
        raise InputError(f"{source} is a run, not one of its checkpoints: the newest is {there[-1]}")
    raise InputError(
        f"{source}: expected a checkpoint in the directory of its run, such as RUN/checkpoints/step-000123"
    )
