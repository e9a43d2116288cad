"""Checkpoints from which a run continues bit for bit: `step-000123` is that after step 123.

shared.pt             what all processes have alike: weights, objective buffers, without ZeRO the optimizer
process-00000.pt      what each process has of its own: random state, rollouts for steps to come, with ZeRO its share of
                      the optimizer
metrics.jsonl         the log up to this step
progress.json         where the run stood, what it was made from, and the SHA-256 of all the files

Damage is found before anything is loaded, by one process for all. Whoever can write into a checkpoint can change its
numbers and their hashes, but loading it executes nothing (torch.load with weights_only).
"""

import hashlib
import json
import random
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.run.atomic import remove, write_directory, writing
from kdkernels.training.run.hashes import HashedFile, sha256_of_all
from kdkernels.training.strategy import Strategy

PREFIX, PROGRESS = "step-", "progress.json"
SHARED, METRICS = "shared.pt", "metrics.jsonl"


@dataclass(frozen=True)
class Contents:
    """What progress.json says. `progress`: numbers of the run, `step` among them; `inputs`: the identities of what the
    run is made from; `processes`: how many wrote it; `sha256`: of every other file.
    """

    progress: dict[str, int]
    inputs: dict[str, Any]
    processes: int
    sha256: dict[str, str]


def save(
    strategy: Strategy,
    directory: Path,
    progress: dict[str, int],
    inputs: dict[str, Any],
    metrics: Path,
    keep: int,
    buffer: dict[str, Any] | None = None,
) -> None:
    """Writes the checkpoint of `progress["step"]` into `directory` and deletes all but the newest `keep` up to it; all
    processes call this together.

    It holds the strategy's state, the random state of every process and its `buffer` of rollouts, a copy of the log at
    `metrics`, and `progress` and `inputs`. Raises DiskError.
    """
    shared, own = strategy.state()

    def write(path: Path) -> dict[str, str]:
        of_its_own = own | {"random": _random_state(), "buffer": buffer or {}}
        hashes = {_own_file(): _dump(of_its_own, path / _own_file())}
        if distributed.rank() == 0:
            hashes[SHARED] = _dump(shared, path / SHARED)
            log = metrics.read_bytes()
            (path / METRICS).write_bytes(log)
            hashes[METRICS] = hashlib.sha256(log).hexdigest()
        return hashes

    def conclude(path: Path, hashes: list[dict[str, str]]) -> None:
        everything = {name: value for part in hashes for name, value in part.items()}
        contents = json.dumps(asdict(Contents(progress, inputs, distributed.world_size(), everything)), sort_keys=True)
        (path / PROGRESS).write_text(json.dumps({"contents": contents, "sha256": _of_text(contents)}), encoding="utf-8")

    new = directory / f"{PREFIX}{progress['step']:06d}"
    write_directory(new, write, conclude)

    def tidy() -> None:
        there = complete(directory)
        newest = there.index(new) + 1  # those behind it are of a run that came further and could not be continued
        for old in (*there[: max(0, newest - keep)], *there[newest:]):
            with writing(old):
                remove(old)

    distributed.by_first(tidy)


def complete(directory: Path) -> list[Path]:
    """The checkpoints in `directory` that were written to their end, oldest first."""
    return sorted(
        (path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()), key=step
    )


def step(path: Path) -> int:
    """The step after which the checkpoint at `path` was written."""
    return int(path.name.removeprefix(PREFIX))


def newest_sound(directory: Path) -> tuple[Path, Contents] | None:
    """The newest checkpoint in `directory` whose files are all there and as they were written, or None where there is
    no checkpoint at all; all processes call this together.

    Each newer one is named in a warning. Raises InputError if all are damaged or it is of another number of processes.
    """
    path, contents, defects = distributed.by_first(lambda: _newest_sound(directory))
    if distributed.rank() == 0:
        for defect in defects:
            warnings.warn(f"--resume: {defect}; trying the one before it", stacklevel=2)
    if path is None and not defects:
        return None
    if path is None:
        raise InputError(
            f"--resume: no checkpoint that can be read in {directory}: {'; '.join(defects)}. Put a sound copy "
            f"there, or move {directory} away to train from the beginning"
        )
    if contents.processes != distributed.world_size():
        raise InputError(
            f"--resume: {path} was written by {contents.processes} processes; expected as many now, got "
            f"{distributed.world_size()}: resume with {contents.processes}, or make a model of it (kdkernels export) "
            "for a run of its own ([student] path)"
        )
    return path, contents


def states(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the strategies of all processes gave for the checkpoint at `path`: (what they have alike, what each has of
    its own). The tensors are read from the disk where they are used. Raises InputError for a damaged checkpoint.
    """
    try:
        contents = _read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    own = [_load(path / _file_of(number), mmap=True) for number in range(contents.processes)]
    return _load(path / SHARED, mmap=True), own


def restore(strategy: Strategy, path: Path) -> dict[str, Any]:
    """Puts strategy and random state back to the checkpoint at `path`; this process's buffer of rollouts in it. Raises
    InputError for files that hold something else than this run's state.
    """
    with distributed.together():
        shared, own = (_load(path / name) for name in (SHARED, _own_file()))
    try:
        strategy.load_state(shared, own)
        _set_random_state(own["random"])
        return own["buffer"]
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        said = " ".join(str(error).split("\n")[:2])  # torch names every weight of another shape
        raise InputError(f"--resume: {path} is not of this run: {type(error).__name__}: {said}") from error


def _newest_sound(directory: Path) -> tuple[Path | None, Contents | None, list[str]]:
    """(path, contents of its progress.json, what is wrong with each newer one)."""
    defects = []
    for path in reversed(complete(directory)):
        try:
            return path, _read(path), defects
        except (OSError, ValueError) as error:
            defects.append(f"{path} is damaged: {error}")
    return None, None, defects


def _read(path: Path) -> Contents:
    """The contents of the checkpoint's progress.json. Raises OSError for a file that is missing or cannot be read,
    ValueError for one whose contents changed.
    """
    try:
        text = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        contents, expected = text["contents"], text["sha256"]
        if _of_text(contents) != expected:
            raise ValueError("its hash is another one")
        contents = Contents(**json.loads(contents))
        paths = [path / name for name in contents.sha256.keys() | {SHARED, METRICS}]
        if not all(type(value) is int and value >= 0 for value in contents.progress.values()):
            raise ValueError(f"expected counts, got {contents.progress}")
        if not isinstance(contents.inputs, dict):
            raise ValueError(f"expected identities by their keys, got {contents.inputs}")
        if contents.progress["step"] != step(path):
            raise ValueError(f"it is of step {contents.progress['step']}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the contents of {PROGRESS} changed: {error}") from error
    for file, found in zip(paths, sha256_of_all(paths), strict=True):
        if found != contents.sha256.get(file.name):
            raise ValueError(f"the contents of {file.name} changed")
    return contents


def _own_file() -> str:
    return _file_of(distributed.rank())


def _file_of(process: int) -> str:
    return f"process-{process:05d}.pt"


def _dump(state: Any, path: Path) -> str:
    """Writes `state` to `path`; the SHA-256 of the file."""
    with path.open("wb") as file:
        hashed = HashedFile(file)
        torch.save(state, hashed)
    return hashed.hexdigest()


def _load(path: Path, mmap: bool = False) -> Any:
    """What `_dump` wrote to `path`. Raises InputError for anything that is more than tensors, numbers and text."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a file that is no pickle, or one of something else, makes of the reader
        raise InputError(
            f"--resume: {path} holds something else than tensors, numbers and text, and is not loaded: no checkpoint "
            "of kdkernels does"
        ) from error


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
