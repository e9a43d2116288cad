"""A directory of files that are made once, each as a whole: a command that was killed goes on with those that are not
there.

manifest.json    "made_from": the identities of what the files are made from (run/identity.py); "settings"; and, once
                 all are there, "files": the SHA-256 of each
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError
from kdkernels.training.processes import distributed
from kdkernels.training.run import lock
from kdkernels.training.run.atomic import remove_unfinished, write_bytes, write_text
from kdkernels.training.run.hashes import sha256_of_all
from kdkernels.training.run.identity import MANIFEST, Identity, differences


class Store:
    """The directory `root`, which the recipe's `key` names.

    Args:
        root: it need not be there.
        key: such as "[responses] output", for error messages.
        made_from, settings: what the files are to be made from, and how, or must have been.
    """

    def __init__(self, root: str | Path, key: str, made_from: Mapping[str, Identity], settings: Mapping[str, Any]):
        self.root, self.key = Path(root), key
        self.made_from, self.settings = dict(made_from), json.loads(json.dumps(settings))

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the directory, or checks that it is this one, and keeps other commands out of it; all processes call
        this together. Raises InputError where it is anything else, DiskError.
        """
        with ExitStack() as held:

            def begin() -> None:
                held.enter_context(lock.locked(self.root))
                remove_unfinished(self.root)
                if self.manifest.is_file():
                    self._compare(self._read())
                elif any(path.name != lock.NAME for path in self.root.iterdir()):
                    raise InputError(
                        f"{self.key}: {self.root} is not empty, and {MANIFEST} is missing: give another directory"
                    )
                else:
                    self._write({})

            distributed.by_first(begin)
            yield

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are not there."""
        return [name for name in names if not (self.root / name).is_file()]

    def make(self, names: Sequence[str], make: Callable[[str], bytes]) -> None:
        """Writes each of the files that is missing, every process its share of them: `make(name)` is its contents. All
        processes call this together; what one raises, all raise. Raises DiskError.
        """
        missing = distributed.by_first(lambda: self.missing(names))
        with distributed.together():
            for name in missing[distributed.rank() :: distributed.world_size()]:
                write_bytes(self.root / name, make(name))

    def finish(self, names: Sequence[str]) -> None:
        """Writes the hashes of all files into the manifest, if they are not in it; all processes call this together."""

        def finish() -> None:
            if "files" not in self._read():
                hashes = sha256_of_all([self.root / name for name in names])
                self._write({"files": dict(zip(names, hashes, strict=True))})

        distributed.by_first(finish)

    def is_complete(self) -> bool:
        """Whether all files were made at some time; whether from what is asked for, `check` says."""
        return self.manifest.is_file() and "files" in self._read()

    def check(self) -> list[Path]:
        """All files, which must be there as they were made, from what is asked for. Raises InputError naming what is
        missing, changed or other, and what to do.
        """
        if not self.is_complete():
            what = "is not complete" if self.manifest.is_file() else "is missing"
            raise InputError(f"{self.key}: {self.root} {what}: kdkernels rollout RECIPE makes it, or goes on with it")
        contents = self._read()
        self._compare(contents)
        missing = self.missing(list(contents["files"]))
        if missing:
            raise InputError(
                f"{self.key}: {self.root / missing[0]} is missing ({len(missing)} of {len(contents['files'])} files): "
                f"put it back, or delete {self.manifest}'s directory and make all anew with kdkernels rollout RECIPE"
            )
        paths = [self.root / name for name in contents["files"]]
        for path, now, then in zip(paths, sha256_of_all(paths), contents["files"].values(), strict=True):
            if now != then:
                raise InputError(
                    f"{self.key}: {path} is cut or changed: its contents are not those in {MANIFEST}: put back what it "
                    f'was, or delete it and "files" in {self.manifest}, and run kdkernels rollout RECIPE'
                )
        return paths

    def _compare(self, contents: Mapping[str, Any]) -> None:
        found = differences(contents["made_from"], self.made_from, {})
        old, new = contents["settings"], self.settings
        found += [
            f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} in the recipe"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if found:
            raise InputError(
                f"{self.key}: {self.root} was made from something else: {'; '.join(found)}. Put back what it was made "
                "from, or give another directory and run kdkernels rollout RECIPE"
            )

    def _read(self) -> dict[str, Any]:
        try:
            contents = json.loads(self.manifest.read_text(encoding="utf-8"))
            if all(isinstance(contents[key], dict) for key in ("made_from", "settings")):
                return contents
            problem = "made_from and settings are no objects"
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{self.key}: {self.manifest} is damaged: {problem}: give another directory")

    def _write(self, more: Mapping[str, Any]) -> None:
        contents = {"made_from": self.made_from, "settings": self.settings, **more}
        write_text(self.manifest, json.dumps(contents, indent=1) + "\n")
