"""Weights & Biases and Trackio: the numbers of metrics.jsonl, where a recipe's [log] asks for them to go there too."""

import importlib
from collections.abc import Mapping
from typing import Any

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.schema import to_tables
from kdkernels.training.run.atomic import write_text
from kdkernels.training.run.directory import RunDirectory

NAMES = ("wandb", "trackio")  # keys of [log], packages and extras of kdkernels alike
WANDB_ID = "wandb-id"  # the file of a run that says under which id it is there


def check_trackers(config: Config) -> None:
    """Raises MissingPackage where one that the recipe asks for is not installed."""
    for name in _asked(config):
        _package(name)


def open_trackers(config: Config, run: RunDirectory, resumed: bool) -> list["Tracker"]:
    """What the recipe asks for, begun or, for a resumed run, gone on with; none on processes but the first. All
    processes call this together. Raises InputError where one cannot begin, DiskError.
    """
    opened = []
    with distributed.together():
        if distributed.rank() == 0:
            opened += [Tracker(name, config, run, resumed) for name in _asked(config)]
    return opened


class Tracker:
    """A run of wandb or trackio, named after the run's directory."""

    def __init__(self, name: str, config: Config, run: RunDirectory, resumed: bool):
        self.name = name
        options: dict[str, Any] = {"project": config.log.project, "name": run.root.name, "config": to_tables(config)}
        known = run.root / WANDB_ID
        if name == "wandb":
            earlier = known.read_text(encoding="utf-8").strip() if resumed and known.is_file() else None
            options |= {"dir": str(run.root), "id": earlier, "resume": "allow"}
        else:
            options |= {"resume": "allow" if resumed else "never"}
        try:
            self.run = _package(name).init(**options)
        except Exception as error:  # packages of others, which log in and reach out to servers
            raise InputError(
                f"[log] {name}: it could not begin: {type(error).__name__}: {error}. Mend that, or leave it out: "
                f"--set log.{name}=false"
            ) from error
        if name == "wandb":
            write_text(known, str(self.run.id))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of `step`. Raises whatever the package does."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self.run.finish()


def _asked(config: Config) -> list[str]:
    return [name for name in NAMES if getattr(config.log, name)]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"[log] {name} needs {error.name}: pip install kdkernels[{name}]") from error
