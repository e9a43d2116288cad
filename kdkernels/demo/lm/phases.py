"""What the demo of a language model trains: recipes of recipes/, each from the same student."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdkernels.training.recipe.extends import read_tables

RECIPES = Path(__file__).parents[3] / "recipes"
ROOT = "runs/demo-lm/"  # the demo's directory, as the recipes spell it


@dataclass(frozen=True)
class Arm:
    """One training: its directory and the end of its recipe's name, and what the report calls it.

    must_learn: whether the demo fails unless its KL to the teacher is clearly below that of the start.
    """

    name: str
    title: str
    must_learn: bool = False

    @property
    def recipe(self) -> Path:
        return RECIPES / f"smollm2-{self.name}.toml"


ARMS = (
    Arm("sft", "SFT on the teacher's answers"),
    Arm("gkd", "GKD on the teacher's answers (off-policy)", must_learn=True),
    Arm("gkd-on-policy", "GKD on the student's own (on-policy)", must_learn=True),
    Arm("tsd-kd", "TSD-KD, the paper's weights (on-policy)"),
    Arm("tsd-kd-scaled", "TSD-KD, scaled weights (on-policy)"),
)


def settings(arm: Arm, output: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The arm's --set assignments: every path of its recipe, moved to `output`, and `overrides`."""
    tables = read_tables(arm.recipe)
    values = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    paths = {key: value for key, value in values.items() if isinstance(value, str) and value.startswith(ROOT)}
    moved = {key: path.replace(ROOT, f"{output.as_posix()}/", 1) for key, path in paths.items()}
    return [*(f"{key}={json.dumps(path)}" for key, path in moved.items()), *overrides]
