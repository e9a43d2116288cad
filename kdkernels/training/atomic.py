"""Files and directories that are there completely or not at all, whenever the process is killed.

They are written under a name that no reader looks at, flushed to the disk and then renamed. Deleting a directory goes
the other way: renamed first, then emptied.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kdkernels.training import distributed

UNFINISHED = "unfinished-"


def write_text(path: Path, text: str) -> None:
    """Makes `text` the contents of the file `path`; only one process may call this."""
    unfinished = path.with_name(UNFINISHED + path.name)
    unfinished.write_text(text, encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path)
    _flush(path.parent)


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
