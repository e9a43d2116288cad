"""A run's directory: what it is made of and when it may be used.

config.toml              the recipe with every default filled in
metrics.jsonl            one line per step (step 0: the evaluation before training)
tensorboard/             the same numbers, where TensorBoard is installed
checkpoints/step-000123/
evaluation-000123.jsonl  one line per held-out problem, after that step
final/                   model and tokenizer, as transformers reads them
report.md                before and after
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdkernels.training import distributed
from kdkernels.training.atomic import write_text
from kdkernels.training.config import Config
from kdkernels.training.jsonl import json_line
from kdkernels.training.schema import InputError, read_toml, to_tables, to_toml


class RunDirectory:
    """The paths of a run under `root`."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.toml"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.final = self.root / "final"
        self.report = self.root / "report.md"

    def evaluation(self, step: int) -> Path:
        """Where the records of the evaluation after `step` are."""
        return self.root / f"evaluation-{step:06d}.jsonl"

    def check(self, config: Config, resume: bool) -> None:
        """Raises InputError where a new run would write into an old one, or a resumed one has another recipe than the
        interrupted one.
        """
        if not resume:
            if self.root.exists() and any(self.root.iterdir()):
                raise InputError(
                    f"[run] output: {self.root} is not empty: continue its run with --resume, delete it, or give "
                    "another directory"
                )
            return
        if not self.config.is_file():
            raise InputError(f"--resume: no run in {self.root}: {self.config.name} is missing")
        differences = _differences(read_toml(self.config), to_tables(config))
        if differences:
            raise InputError(
                f"--resume: the recipe differs from that of the run in {self.root}: {'; '.join(differences)}"
            )

    def create(self, config: Config) -> None:
        """Makes the directory, on rank 0."""
        if distributed.rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(self.config, to_toml(config))

    def write_records(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Writes the records of the evaluation after `step`, on rank 0."""
        if distributed.rank() == 0:
            write_text(self.evaluation(step), "".join(map(json_line, records)))


def _differences(old: dict, new: dict) -> list[str]:
    """Every key in which two recipes differ, as `section.key: old -> new`."""
    keys = dict.fromkeys((section, key) for tables in (old, new) for section, table in tables.items() for key in table)
    pairs = {
        f"{section}.{key}": (old.get(section, {}).get(key), new.get(section, {}).get(key)) for section, key in keys
    }
    return [f"{name}: {before!r} -> {after!r}" for name, (before, after) in pairs.items() if before != after]
