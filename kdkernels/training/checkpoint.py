"""Checkpoints from which a run continues bit for bit: `step-000123` is that after step 123.

`progress.json` of a checkpoint holds where the run stood and the checksums of all its other files, so that damage is
found before anything is loaded, by one process for all.
"""

import json
import random
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.training import distributed
from kdkernels.training.atomic import UNFINISHED, remove_directory, write_directory
from kdkernels.training.schema import InputError

PREFIX, PROGRESS, ENGINE = "step-", "progress.json", "engine"


def save(engine, directory: Path, progress: dict[str, int], keep: int) -> None:
    """Writes the checkpoint of `progress["step"]` into `directory` and deletes all but the newest `keep` up to it; all
    processes call this together.

    It holds weights, objective buffers, optimizer (through DeepSpeed), the random state of every process and
    `progress`.
    """

    def write(path: Path) -> None:
        engine.save_checkpoint(str(path), tag=ENGINE, save_latest=False)
        torch.save(_random_state(), path / _random_file())
        distributed.barrier()
        if distributed.rank() == 0:
            files = {file.relative_to(path).as_posix(): _checksum(file) for file in path.rglob("*") if file.is_file()}
            contents = {"progress": progress, "processes": distributed.world_size(), "checksums": files}
            (path / PROGRESS).write_text(json.dumps(contents))

    new = directory / f"{PREFIX}{progress['step']:06d}"
    write_directory(new, write)
    if distributed.rank() == 0:
        for left_over in directory.glob(f"{UNFINISHED}*"):  # of a deletion or a write that was killed
            shutil.rmtree(left_over)
        there = complete(directory)
        newest = there.index(new) + 1  # those behind it are of a run that came further and could not be continued
        for old in (*there[: max(0, newest - keep)], *there[newest:]):
            remove_directory(old)


def complete(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that were written to their end, oldest first."""
    numbers = {path: path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*")}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


def newest_sound(directory: Path) -> tuple[Path, dict[str, int]]:
    """The newest checkpoint in `directory` whose files are all there and as they were written, and its `progress`; all
    processes call this together.

    Each newer one is named in a warning. Raises InputError if there is none or it is of another number of processes.
    """
    found = _newest_sound(directory) if distributed.rank() == 0 else None
    path, contents, defects = distributed.gathered(found)[0]
    if distributed.rank() == 0:
        for defect in defects:
            warnings.warn(f"--resume: {defect}; trying the one before it", stacklevel=2)
    if path is None:
        what = "no checkpoint that can be read" if defects else "no checkpoint yet"
        raise InputError(f"--resume: {what} in {directory}: delete {directory.parent} and start the run again")
    if contents["processes"] != distributed.world_size():
        raise InputError(
            f"--resume: {path} was written by {contents['processes']} processes; expected as many now, "
            f"got {distributed.world_size()}"
        )
    return path, contents["progress"]


def restore(engine, path: Path) -> None:
    """Puts engine and random state back to the checkpoint at `path`."""
    loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE)
    if loaded is None:
        raise InputError(f"--resume: DeepSpeed found nothing to load in {path / ENGINE}")
    _set_random_state(torch.load(path / _random_file(), weights_only=False))


def _newest_sound(directory: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """(path, contents of its progress.json, what is wrong with each newer one)."""
    defects = []
    for path in reversed(complete(directory)):
        try:
            return path, _read(path), defects
        except (OSError, ValueError) as error:
            defects.append(f"{path} is damaged: {error}")
    return None, None, defects


def _read(path: Path) -> dict[str, Any]:
    """The contents of the checkpoint's progress.json. Raises OSError for a file that is missing or cannot be read,
    ValueError for one whose contents changed.
    """
    contents = json.loads((path / PROGRESS).read_text())
    for name, checksum in contents["checksums"].items():
        if _checksum(path / name) != checksum:
            raise ValueError(f"the contents of {name} changed")
    return contents


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _random_file() -> str:
    return f"random-{distributed.rank():05d}.pt"


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
