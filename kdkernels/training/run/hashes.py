"""SHA-256 of files, while they are written and when they are read again."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 22


def sha256(path: Path) -> str:
    """The hash of the contents of the file at `path`. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> list[str]:
    """The hashes of several files, as many at once as there are processors: one takes a second for about a GB, which is
    less than it takes to read most disks. Raises OSError.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(sha256, paths))


class HashedFile:
    """A file to be written whose hash is known at the end without reading it again."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        """Writes all of `data`."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Passes on what is buffered."""
        self.file.flush()

    def hexdigest(self) -> str:
        """The hash of everything written so far."""
        return self.digest.hexdigest()
