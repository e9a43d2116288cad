"""Training in stages: recipes one after another, or the stages of one, each of which may start from what the one before
trained, and learn from data that are made with it.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kdkernels.errors import InputError
from kdkernels.training.deepspeed_strategy import accumulation_steps
from kdkernels.training.inputs import build_objective
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.read import complete
from kdkernels.training.recipe.stages import COMPRESSIONS, Compression, Stage, read_recipes
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.stages import write_stages_report
from kdkernels.training.trainer import Result, train


class Compressor(Protocol):
    """Makes the data of the stages whose target is "compressed"."""

    def check(self, compression: Compression) -> None:
        """Raises InputError where it is clear before any training that they cannot be made; all processes call this
        together.
        """

    def make(self, compression: Compression) -> None:
        """Makes the records of `compression.source`, rewritten, the file `compression.output`, or goes on with that; of
        what is there already nothing is left to do. All processes call this together.

        Raises:
            InputError: it cannot, or what is there was made from something else. DiskError, ServerError.
        """


def run_stages(
    recipes: Sequence[str | Path], overrides: Sequence[str] = (), compressor: Compressor | None = None
) -> list[Result]:
    """Trains each of the `recipes`, with the `overrides`, in their order, and of each its stages. Their paths may name
    the final/ of an earlier one, such as `[student] path` of a recipe that goes on where the one before it ended.

    A stage that is finished already is skipped, one that was begun is resumed: whatever interrupts the stages, they are
    called again in the same way.

    Args:
        compressor: for the stages of the target "compressed": `kdkernels.compression.TeacherCompressor()`.

    Returns:
        The result of each stage.

    Raises:
        InputError: a recipe cannot be used, which is found before anything is trained; or a stage is there that another
            recipe or other data and models made.
        FloatingPointError, DiskError, Stopped: as `train`. ServerError: a teacher that rewrites does not answer.
    """
    distributed.start()
    with distributed.together():
        stages = completed(read_recipes(recipes, overrides))
    return train_stages(stages, compressor)


def completed(stages: Sequence[Stage]) -> list[Stage]:
    """What `read_recipes` returned, with every default of their recipes filled in. Raises InputError."""
    whole = [replace(stage, config=complete(stage.config, stage.source)) for stage in stages]
    by_output = {stage.config.run.output: stage.config for stage in whole}
    return [
        stage
        if stage.compression is None
        else replace(
            stage,
            compression=replace(stage.compression, student=by_output[stage.compression.student.run.output]),
        )
        for stage in whole
    ]


def train_stages(stages: Sequence[Stage], compressor: Compressor | None = None) -> list[Result]:
    """As `run_stages`, of what `read_recipes` and `completed` made of the recipes."""
    for root in dict.fromkeys(stage.root for stage in stages if stage.root is not None):
        distributed.by_first(lambda root=root: _check_root(root, stages))
    for stage in stages:
        build_objective(stage.config)
        accumulation_steps(stage.config)
        RunDirectory(stage.config.run.output).check(stage.config)
        if stage.compression is not None:
            if compressor is None:
                raise InputError(
                    f'{stage.source}: target "compressed" needs a compressor: kdkernels train has one; from Python '
                    "run_stages(recipes, compressor=kdkernels.compression.TeacherCompressor())"
                )
            compressor.check(stage.compression)
    results = []
    for stage in stages:
        if stage.compression is not None:
            gc.collect()
            compressor.make(stage.compression)
        results.append(_run(stage.config))
        if stage.root is not None:
            done = list(zip(stages, results, strict=False))
            there = [(one, result) for one, result in done if one.root == stage.root]
            distributed.by_first(lambda root=stage.root, there=there: write_stages_report(Path(root), there))
    return results


def _check_root(root: str, stages: Sequence[Stage]) -> None:
    """Raises InputError for a directory of stages that holds something else."""
    place = Path(root)
    if (place / "config.toml").is_file():
        raise InputError(
            f"[run] output: {root} holds the run of a recipe without stages: give the stages another directory"
        )
    known = {stage.name for stage in stages if stage.root == root} | {COMPRESSIONS}
    there = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if there and not there & known:
        raise InputError(
            f"[run] output: {root} is not empty, and what it holds are no stages of this recipe: give another directory"
        )


def _run(config: Config) -> Result:
    distributed.limit_waiting(config.run.timeout_seconds)
    gc.collect()  # an engine refers to itself: that of the stage before would stay in memory beside this one's
    return train(config, resume=RunDirectory(config.run.output).config.is_file())
