"""What may change in a run's recipe while the run rests, and what did.

config.toml is the recipe in force. One that a change put out of force stays beside it: config-000050.toml is the recipe
by which the run was trained up to step 50. Whatever is killed in between, these files say the same.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import CollapseConfig, Config, LogConfig
from kdkernels.training.recipe.resolve import PATHS
from kdkernels.training.recipe.schema import read_toml, to_tables, to_toml, toml_value
from kdkernels.training.run.atomic import remove, write_text, writing

LENGTHS = ("train.steps", "train.epochs")
CHANGEABLE = (  # the keys that another value may be asked for of, by name, when a run is resumed
    *LENGTHS,
    "train.max_skipped_steps",
    "optimizer.lr",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "run.timeout_seconds",
    "rollout.samples",
    "rollout.samples_every",
    *(f"rollout.{name}" for name in ("url", "key_variable", "at_once", "timeout_seconds", "gpu_memory", "max_drift")),
    *(f"collapse.{entry.name}" for entry in fields(CollapseConfig)),
    *(f"log.{entry.name}" for entry in fields(LogConfig)),
)
# what follows from a recipe's epochs, or its steps, where it leaves them open
FOLLOWING = ("train.steps", "checkpoint.every", "rollout.samples_every")
Tables = Mapping[str, Mapping[str, Any]]


def check_recipe(path: Path, config: Config, asked: Collection[str]) -> bool:
    """Whether `config` differs from the recipe of the run at `path`, its config.toml, in how long it trains.

    asked: keys that were asked for by name, such as "train.steps". Raises InputError where the recipe differs in
    anything that was not, or that may not change, and where it cannot be read.
    """
    old, new, run = read_toml(path), to_tables(config), path.parent
    if not all(isinstance(table, dict) for table in old.values()):
        raise InputError(f"--resume: {path} is damaged: expected nothing but tables")
    unknown = _unknown(old, config)
    if unknown:
        raise InputError(
            f"--resume: the run in {run} was begun by another version of kdkernels, which did not know "
            f"{', '.join(unknown)}: continue it with that version, or start a new run in another directory"
        )
    changes = _known(differences(old, new), config)
    free = set(asked) & set(CHANGEABLE)
    if free & set(LENGTHS):
        free |= {*LENGTHS, *FOLLOWING}
    refused = {key: pair for key, pair in changes.items() if key not in free}
    if refused:
        raise InputError(
            f"--resume: the recipe differs from that of the run in {run}: {told(refused)}. {_way(refused)}"
        )
    return any(key in changes for key in LENGTHS)


def told_of_finished(path: Path, config: Config) -> str:
    """What `config` has otherwise than the finished run at `path`, its config.toml: it comes too late. In words, or
    nothing.
    """
    late = _known(differences(read_toml(path), to_tables(config)), config)
    return f"; without more steps, this changes nothing: {told(late)}" if late else ""


def _known(changes: dict[str, tuple[Any, Any]], config: Config) -> dict[str, tuple[Any, Any]]:
    """`changes` without what epochs come to, before the data are read."""
    if config.train.epochs is None:
        return changes
    return {key: pair for key, pair in changes.items() if key not in FOLLOWING or pair[1] is not None}


def differences(old: Tables, new: Tables) -> dict[str, tuple[Any, Any]]:
    """Every key in which two recipes differ, as `section.key`, with its values in both; but for paths, which may be
    written another way: there it is the contents that count.
    """
    keys = dict.fromkeys((section, key) for tables in (old, new) for section, table in tables.items() for key in table)
    pairs = {place: tuple(tables.get(place[0], {}).get(place[1]) for tables in (old, new)) for place in keys}
    return {
        f"{section}.{key}": pair
        for (section, key), pair in pairs.items()
        if pair[0] != pair[1] and (section, key) not in PATHS
    }


def told(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """`changes` in words."""
    return "; ".join(f"{key}: {before!r} -> {after!r}" for key, (before, after) in changes.items())


def write_config(path: Path, config: Config, step: int) -> None:
    """Makes `config` the recipe at `path` from `step` on, at which the run goes on; the one up to there is kept. Only
    one process may call this. Raises DiskError.
    """
    later = [one for one in _superseded(path) if one[0] >= step]
    before = later[0][1] if later else path  # the recipe up to `step`; what was trained behind it is trained again
    changed = step > 0 and differences(read_toml(before), to_tables(config))
    kept = path.with_name(f"{path.stem}-{step:06d}{path.suffix}")
    if changed and before != kept:
        write_text(kept, before.read_text(encoding="utf-8"))
    if changed or before != path or step == 0:
        write_text(path, to_toml(config))
    for _, old in later:
        if old != kept or not changed:
            with writing(old):
                remove(old)


def changes(path: Path) -> list[tuple[int, str]]:
    """After which steps the recipe at `path` was changed, and in what, in words."""
    steps = [step for step, _ in _superseded(path)]
    recipes = [read_toml(file) for _, file in [*_superseded(path), (None, path)] if steps]
    return [(step, told(differences(*pair))) for step, pair in zip(steps, itertools.pairwise(recipes), strict=True)]


def _superseded(path: Path) -> list[tuple[int, Path]]:
    """The recipes that are no more in force, with the step up to which they were, in order."""
    start = f"{path.stem}-"
    found = [(file.stem.removeprefix(start), file) for file in path.parent.glob(f"{start}*{path.suffix}")]
    return sorted((int(step), file) for step, file in found if step.isdecimal())


def _way(refused: Mapping[str, tuple[Any, Any]]) -> str:
    """What to do about differences, in words."""
    if not refused.keys() <= set(CHANGEABLE):
        return "Give it the recipe that it began with, or start a new run in another directory"
    named = " ".join(f"--set {key}={toml_value(after)}" for key, (_, after) in refused.items() if after is not None)
    return f"What a run may change is to be asked for by name: --resume {named}".rstrip()


def _unknown(recipe: Tables, config: Config) -> list[str]:
    """The keys that a run writes into its config.toml whatever the user sets, and that `recipe`, read there, lacks."""
    return [
        f"{section}.{entry.name}"
        for section, table in recipe.items()
        if is_dataclass(getattr(config, section, None))
        for entry in fields(getattr(config, section))
        if entry.default is not MISSING and entry.default is not None and entry.name not in table
    ]
