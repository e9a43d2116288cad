"""Imports run one way only, and the core needs nothing but torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kdkernels"

# A unit is a module or package right under kdkernels/. Leaves may be imported by all, and import only leaves.
LEAVES = {"_ops", "checks", "divergences", "errors", "http", "tensors", "layout", "trainers", "wrappers"}
# Each imports only what is to its left, leaves, and itself. The package's __init__ collects the core.
ORDER = [
    "reference",
    "compute",
    "kernels",
    "sources",
    "engine",
    "machine",
    "functional",
    "modules",
    "objectives",
    "distillation",
    "__init__",
    "data",
    "teachers",
    "rollouts",
    "judges",
    "training",
    "curation",
    "compression",
    "cli",
    "__main__",
    "demo",
]
CORE = LEAVES | set(ORDER[:10])
THIRD_PARTY_OF_THE_CORE = {"torch", "triton"}


def imported(source: str, module: tuple[str, ...], is_package: bool) -> set[tuple[str, ...]]:
    """Dotted names that a module of kdkernels imports, made absolute; ``from a import b`` gives a.b."""
    here = module if is_package else module[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def unit_of(name: tuple[str, ...]) -> str:
    """``from . import x`` inside kdkernels/ names the unit x; a name of the package itself comes from __init__."""
    units = LEAVES | set(ORDER)
    return name[1] if len(name) > 1 and name[1] in units else "__init__"


def violations(sources: dict[tuple[str, ...], tuple[str, bool]]) -> list[str]:
    """Forbidden imports of {module: (source, is a package)}."""
    out = []
    for module, (source, is_package) in sources.items():
        unit = module[1] if len(module) > 1 else "__init__"
        if unit not in LEAVES and unit not in ORDER:
            out.append(f"{unit} has no place in the order")
            continue
        for name in sorted(imported(source, module, is_package)):
            if name[0] != "kdkernels":
                known = name[0] in sys.stdlib_module_names or name[0] in THIRD_PARTY_OF_THE_CORE
                if unit in CORE and not known:
                    out.append(f"{'.'.join(module)} needs {name[0]}")
                continue
            target = unit_of(name)
            allowed = target == unit or target in LEAVES
            if unit in ORDER and target in ORDER:
                allowed |= ORDER.index(target) < ORDER.index(unit)
            if not allowed:
                out.append(f"{'.'.join(module)} imports {'.'.join(name)}")
    return out


def modules() -> dict[tuple[str, ...], tuple[str, bool]]:
    out = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("kdkernels", *path.relative_to(PACKAGE).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        out[parts[:-1] if is_package else parts] = (path.read_text(), is_package)
    return out


def test_imports_run_one_way():
    found = modules()
    assert len(found) > 30 and ("kdkernels", "kernels", "eager") in found
    assert violations(found) == []


def planted(module: str, source: str) -> list[str]:
    return violations({tuple(module.split(".")): (source, False)})


def test_the_check_sees_what_is_planted():
    assert planted("kdkernels.kernels.eager", "from ..engine.loop import run")
    assert planted("kdkernels.kernels.eager", "from .. import objectives")
    assert planted("kdkernels.kernels.eager", "from kdkernels import TSDKD")
    assert planted("kdkernels.kernels.eager", "def f():\n    import kdkernels.training.data")
    assert planted("kdkernels.objectives.gkd", "from ..training import config")
    assert planted("kdkernels.engine.loop", "from kdkernels.functional import entropy")
    assert planted("kdkernels.reference", "from .kernels import backend_for")
    assert planted("kdkernels.sources.head", "from ..engine import loop")
    assert planted("kdkernels.training.trainer", "from kdkernels.demo import phases")
    assert planted("kdkernels.functional", "import transformers")
    assert planted("kdkernels.data.batch", "from kdkernels.training.recipe.config import Config")
    assert planted("kdkernels.judges", "from kdkernels.training.step import Parts")
    assert planted("kdkernels.rollouts.local", "from kdkernels.training.processes import distributed")
    assert planted("kdkernels.distillation", "def f():\n    from kdkernels.training.processes import distributed")
    assert planted("kdkernels.sources", "def f():\n    from numpy import array")
    assert planted("kdkernels.helpers", "")
    assert not planted(
        "kdkernels.kernels.eager", "import math\nimport torch\nfrom .. import reference\nfrom . import native"
    )
    assert not planted("kdkernels.demo.phases", "import kdkernels as kd\nfrom ..training import config\nimport numpy")


def test_importing_the_package_pulls_in_nothing_else():
    code = """
import sys, torch
before = set(sys.modules)
import kdkernels
for name in kdkernels.__all__:
    getattr(kdkernels, name)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - sys.stdlib_module_names - {"torch"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kdkernels']"
