"""Files and directories that are there completely or not at all, whenever the process is killed or the disk is full.

They are written under a name that no reader looks at, flushed to the disk and then renamed. Deleting goes the other
way: renamed first, then emptied.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

from kdkernels.training.errors import DiskError
from kdkernels.training.processes import distributed

UNFINISHED = "unfinished-"
NO_SPACE = "no space left on the disk"
FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskError about `path` for whatever the operating system refuses to write in here.

    Python says so by an OSError, the libraries written in Rust by other exceptions with `os error 28` in their text,
    and torch.save by one that follows an OSError.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        why = NO_SPACE if number in FULL else f"cannot be written: {os.strerror(number)}"
        raise DiskError(f"{path}: {why}") from error


def is_full(error: OSError) -> bool:
    """Whether there was no space left for what `error` is about."""
    return error.errno in FULL


def write_text(path: Path, text: str) -> None:
    """Makes `text` the contents of the file `path`; only one process may call this. Raises DiskError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, contents: bytes) -> None:
    """Makes `contents` those of the file `path`; only one process may call this. Raises DiskError."""
    unfinished = path.with_name(UNFINISHED + path.name)
    with writing(path), _removed_on_failure(unfinished):
        unfinished.write_bytes(contents)
        _flush(unfinished)
        unfinished.replace(path)
        _flush(path.parent)


def append(file: FileIO, contents: bytes) -> None:
    """Writes all of `contents` to the end of the unbuffered `file`. Raises DiskError."""
    with writing(Path(file.name)):
        while contents:
            contents = contents[file.write(contents) :]


def write_directory(
    path: Path, write: Callable[[Path], T], conclude: Callable[[Path, list[T]], None] | None = None
) -> None:
    """Makes the directory `path` out of what every process's `write(directory)` puts into it and then, on rank 0,
    `conclude(directory, what the writes returned)`, replacing an older one; all processes call this together, and what
    one of them raises is raised on all. Raises DiskError.
    """
    unfinished = path.with_name(UNFINISHED + path.name)

    def prepare() -> None:
        with writing(path):
            remove(unfinished)
            unfinished.mkdir(parents=True)

    def finish() -> None:
        with writing(path):
            if conclude is not None:
                conclude(unfinished, parts)
            for entry in [*unfinished.rglob("*"), unfinished]:
                _flush(entry)
            remove(path)
            unfinished.rename(path)
            _flush(path.parent)

    with _removed_on_failure(unfinished):
        distributed.by_first(prepare)
        with distributed.together(), writing(path):
            part = write(unfinished)
        parts = distributed.gathered(part)
        distributed.by_first(finish)


def remove(path: Path) -> None:
    """Deletes the file or directory `path`, if there is one, so that a deletion cut short leaves nothing under its
    name. Of a symbolic link only the link goes: what it points to is somewhere else, and somebody else's.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        doomed = path
        if not path.name.startswith(UNFINISHED):
            doomed = path.with_name(f"{UNFINISHED}deletion-{path.name}")
            remove(doomed)
            path.rename(doomed)
        shutil.rmtree(doomed)


def remove_unfinished(directory: Path) -> None:
    """Deletes what writes and deletions that were killed have left in `directory`."""
    for left_over in directory.glob(f"{UNFINISHED}*"):
        remove(left_over)


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Half of a file is of no use, and may be what fills the disk."""
    try:
        yield
    except BaseException:
        if distributed.rank() == 0:
            with suppress(OSError):  # the failure itself is what has to be told
                remove(path)
        raise


def _error_number(error: BaseException | None) -> int | None:
    """The operating system's error number behind `error`, or behind what was being handled when it came."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
