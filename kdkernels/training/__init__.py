"""The trainer: `kdkernels train RECIPE.toml`, or from Python

from kdkernels.training import load_config, train
result = train(load_config("recipes/gsm8k-small.toml", overrides=["train.steps=10"]))

`run_stages` trains several recipes in a row. Recipes are read without torch and DeepSpeed, which are imported when
`train`, `run_stages` or `Result` is first asked for.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kdkernels.errors import InputError, MissingPackage


@contextmanager
def with_reason() -> Iterator[None]:
    """Says of a package that is not installed what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.startswith("kdkernels"):
            raise
        raise MissingPackage(f"kdkernels.training needs {error.name}: pip install kdkernels[train]") from error


with with_reason():
    from kdkernels.training.recipe.config import Config
    from kdkernels.training.recipe.read import load_config, read_recipe

if TYPE_CHECKING:
    from kdkernels.training.stages import run_stages
    from kdkernels.training.trainer import Result, train

_MODULES = {"Result": "trainer", "train": "trainer", "run_stages": "stages"}
__all__ = ["Config", "InputError", "Result", "load_config", "read_recipe", "run_stages", "train"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with with_reason():
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
