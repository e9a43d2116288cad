"""One run at a time in a directory.

The lock is the operating system's (flock) on a file that names its owner: a killed process has it no more, whatever the
file still says.
"""

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.errors import DiskError
from kdkernels.training.run.atomic import NO_SPACE, is_full

NAME = "run.lock"


@contextmanager
def locked(directory: Path, key: str = "[run] output") -> Iterator[None]:
    """Keeps every other run out of `directory`, which is made if it is not there. Where nothing else has been written
    into it in the end, it is left as it was. `key`: what the recipe calls the directory.

    Raises InputError naming the `key` of the recipe, and the owner where another run is in it, or why no lock can be
    had.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / NAME
    try:
        handle = _own(path, key)
    except OSError as error:
        _remove_empty(made)
        if is_full(error):
            raise DiskError(f"{path}: {NO_SPACE}") from error
        raise InputError(f"{key}: {path} cannot be locked: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        _remove_empty(made)


def refuse_if_locked(directory: Path) -> None:
    """Raises InputError naming the owner where a run is in `directory`; writes nothing."""
    try:
        handle = os.open(directory / NAME, os.O_RDWR | os.O_NOFOLLOW)  # NFS has exclusive locks for writers only
    except OSError:
        return  # nobody has been here; or it is not for this user, as the run itself will say
    try:
        _lock(handle, directory / NAME)
    finally:
        os.close(handle)


def remove_if_nobodys(directory: Path) -> None:
    """Deletes the lock file of a process that was killed, where there is one; that of a run under way stays."""
    path = directory / NAME
    with suppress(OSError, InputError):  # no such file, or not this user's; its owner lives
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            _lock(handle, path)
            path.unlink()
        finally:
            os.close(handle)


def _own(path: Path, key: str) -> int:
    """An open handle of the lock file, which is this process's now."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a link in a directory that somebody else made may point to any file of this user, which is overwritten here
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(handle, path, key)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                owner = f"pid {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
                os.ftruncate(handle, 0)
                os.pwrite(handle, owner.encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner ended and deleted it after we had opened it, perhaps with the directory


def _lock(handle: int, path: Path, key: str = "[run] output") -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        time.sleep(0.2)  # an owner that has just come still has to write its name
        owner = os.pread(handle, 1000, 0).decode(errors="replace") or "a process that is just starting"
        raise InputError(
            f"{key}: another run is in {path.parent} ({owner}): wait for its end, stop it, or give another directory"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{path.parent}: this file system has no locks ({error.strerror}): nothing keeps a second run out",
            stacklevel=2,
        )


def _remove_empty(directories: list[Path]) -> None:
    """Removes the given directories, the innermost first, as far as they are empty."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()
