"""Models that are not on this machine: their published configurations, beside the recipe that names them.

`models/NAME.json` beside a recipe is the transformers configuration of a model whose path or hub name ends in NAME. A
dry run makes its models from these on the meta device, without a network and without weights.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import FINAL, Config
from kdkernels.training.recipe.extends import read_tables
from kdkernels.training.recipe.resolve import model_paths

MODELS = "models"


def described(config: Config, recipes: Sequence[Path]) -> dict[str, Path]:
    """The configuration of every model that is not on this machine, by its key; empty where all are, and where one is
    neither here nor described.

    recipes: the recipe's file and those that it extends: descriptions are looked for beside each of them. The final/
    of a recipe that lies there, which is not trained yet, is described by the model which that recipe starts from.
    """
    if config.student.path is None:
        return {}
    folders = list(dict.fromkeys(file.parent for file in recipes))
    missing = {
        key: path for key, path in model_paths(config).items() if key != "[tokenizer] path" and not _is_here(path)
    }
    found = {key: _description(path, folders) for key, path in missing.items()}
    return {} if None in found.values() else found


def _is_here(path: str) -> bool:
    """Whether a model is in a directory of this machine, or in its cache of the hub."""
    if Path(path).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # no name of the hub
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    return False


def _description(path: str, folders: Sequence[Path], before: Sequence[str] = ()) -> Path | None:
    """The file that describes the model at `path`; `before`: those that are trained, one from the other, from it."""
    files = [folder / MODELS / f"{Path(path).name}.json" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None and Path(path).name == FINAL and path not in before:  # else they go round in a circle
        start = next(_starts(os.path.realpath(path), folders), None)
        return start and _description(start, folders, [*before, path])
    return found


def _starts(final: str, folders: Sequence[Path]) -> Iterator[str]:
    """The model that a recipe in `folders` starts from whose trained model will be `final`."""
    for file in sorted(file for folder in folders for file in folder.glob("*.toml")):
        with suppress(InputError, LookupError, TypeError):  # another recipe, whatever is wrong with it
            tables = read_tables(file)
            if os.path.realpath(os.path.join(tables["run"]["output"], FINAL)) == final:
                yield tables["student"]["path"]
