"""Training in stages: recipes one after another, of which a later one starts from what an earlier one trained."""

import gc
from collections.abc import Sequence
from pathlib import Path

from kdkernels.training.deepspeed_strategy import accumulation_steps
from kdkernels.training.inputs import build_objective
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.read import complete, read_recipes
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.trainer import Result, train


def run_stages(recipes: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[Result]:
    """Trains each of the `recipes`, with the `overrides`, in their order. Their paths may name the final/ of an earlier
    one, such as `[student] path` of a stage that goes on where the one before it ended.

    A stage that is finished already is skipped, one that was begun is resumed: whatever interrupts the stages, they are
    called again in the same way.

    Returns:
        The result of each stage.

    Raises:
        InputError: a recipe cannot be used, which is found before anything is trained; or a stage is there that another
            recipe or other data and models made.
        FloatingPointError, DiskError, Stopped: as `train`.
    """
    distributed.start()
    with distributed.together():
        read = read_recipes(recipes, overrides)
        configs = [complete(config, str(path)) for config, path in zip(read, recipes, strict=True)]
    return train_stages(configs)


def train_stages(configs: Sequence[Config]) -> list[Result]:
    """As `run_stages`, of what `read_recipes` and `complete` made of the recipes."""
    for config in configs:
        build_objective(config)
        accumulation_steps(config)
        RunDirectory(config.run.output).check(config)
    return [_run(config) for config in configs]


def _run(config: Config) -> Result:
    distributed.limit_waiting(config.run.timeout_seconds)
    gc.collect()  # an engine refers to itself: that of the stage before would stay in memory beside this one's
    return train(config, resume=RunDirectory(config.run.output).config.is_file())
