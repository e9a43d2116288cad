"""The trainer: `kdkernels train RECIPE.toml`, or from Python

from kdkernels.training import load_config, train
result = train(load_config("recipes/gsm8k-small.toml", overrides=["train.steps=10"]))
"""

try:
    from kdkernels.errors import InputError
    from kdkernels.training.config import Config, load_config
    from kdkernels.training.trainer import Result, train
except ModuleNotFoundError as error:
    if error.name.startswith("kdkernels"):
        raise
    raise ImportError(f"kdkernels.training needs {error.name}: pip install kdkernels[train]") from error

__all__ = ["Config", "InputError", "Result", "load_config", "train"]
