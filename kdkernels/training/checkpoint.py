"""Checkpoints that are there completely or not at all, from which a run continues bit for bit.

A checkpoint is written under a name that no reader looks at, flushed to the disk and then renamed to `step-000123`; the
directory with the highest number is the latest one. Deleting goes the other way: renamed first, then emptied.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.training import distributed
from kdkernels.training.schema import InputError

PREFIX, UNFINISHED = "step-", "unfinished-"


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Makes the directory `path` out of what `write(directory)` puts into it, replacing an older one; all processes
    call this together.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    if distributed.rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    distributed.barrier()
    write(unfinished)
    distributed.barrier()
    if distributed.rank() == 0:
        for entry in [*unfinished.rglob("*"), unfinished]:
            _flush(entry)
        remove_directory(path)
        unfinished.rename(path)
        _flush(path.parent)
    distributed.barrier()


def remove_directory(path: Path) -> None:
    """Deletes the directory `path`, if there is one, so that a deletion cut short leaves nothing under its name."""
    if path.exists():
        doomed = path.with_name(f"{UNFINISHED}deletion-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(engine, directory: Path, progress: dict[str, int], keep: int) -> None:
    """Writes the checkpoint of `progress["step"]` into `directory` and deletes all but the newest `keep`; all processes
    call this together.

    It holds weights, objective buffers, optimizer, learning-rate schedule (through DeepSpeed), the random state of
    every process and `progress`.
    """

    def write(path: Path) -> None:
        engine.save_checkpoint(str(path), tag="engine", save_latest=False)
        torch.save(_random_state(), path / f"random-{distributed.rank():05d}.pt")
        if distributed.rank() == 0:
            (path / "progress.json").write_text(json.dumps(progress | {"processes": distributed.world_size()}))

    write_directory(directory / f"{PREFIX}{progress['step']:06d}", write)
    if distributed.rank() == 0:
        for left_over in directory.glob(f"{UNFINISHED}*"):  # of a deletion or a write that was killed
            shutil.rmtree(left_over)
        for old in complete(directory)[:-keep]:
            remove_directory(old)


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    numbers = {path: path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*")}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


def read_progress(directory: Path) -> dict[str, int]:
    """The `progress` saved with the latest checkpoint in `directory`. Raises InputError if there is none or it is of
    another number of processes.
    """
    checkpoints = complete(directory)
    if not checkpoints:
        raise InputError(f"--resume: no checkpoint in {directory}")
    progress = json.loads((checkpoints[-1] / "progress.json").read_text())
    if progress["processes"] != distributed.world_size():
        raise InputError(
            f"--resume: {checkpoints[-1]} was written by {progress['processes']} processes; expected as many now, "
            f"got {distributed.world_size()}"
        )
    return progress


def restore(engine, directory: Path) -> None:
    """Puts engine and random state back to the latest checkpoint in `directory`."""
    path = complete(directory)[-1]
    engine.load_checkpoint(str(path), tag="engine")
    _set_random_state(torch.load(path / f"random-{distributed.rank():05d}.pt", weights_only=False))


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
