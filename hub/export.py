"""Writes kdkernels as a repository for Hugging Face's kernels hub: python hub/export.py [FOLDER], by default build/hub.

    build.toml flake.nix CARD.md          of this folder, for kernel-builder
    torch-ext/kdkernels/                  the package that kernel-builder takes
    build/torch-cpu/ build/torch-cuda/    what it makes of it, made here: kernels.get_local_kernel(FOLDER) loads them

The package has every public name. Who loads a kernel has a training loop of their own: what needs more than torch stays
behind (trainer, data, commands), and so do the C++ kernels, which would have to be compiled.
"""

from __future__ import annotations

import ast
import base64
import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "kdkernels"
sys.path.insert(0, str(HERE.parent))

import kdkernels as kd  # noqa: E402

GENERAL = tomllib.loads((HERE / "build.toml").read_text())["general"]
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "triton"}

OPS = '''"""The namespace of this build's torch operators: several builds can be loaded in one process."""

import torch

ops = torch.ops.{build}


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"{build}::{{name}}"
'''
OLDER = '''"""Older releases of `kernels` look for the package here."""

import importlib.util
import sys
from pathlib import Path

if "{build}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{build}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{build}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{build}"])
__all__ = sys.modules["{build}"].__all__
globals().update({{name: getattr(sys.modules["{build}"], name) for name in __all__}})
'''


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "build" / "hub"
    files = package()
    shutil.rmtree(out, ignore_errors=True)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        write(out / name, (HERE / name).read_bytes())
    write(out / "LICENSE", (HERE.parent / "LICENSE").read_bytes())
    for name, content in files.items():
        write(out / "torch-ext" / "kdkernels" / name, content)
    for backend in GENERAL["backends"]:
        for name, content in build(files, backend).items():
            write(out / "build" / f"torch-{backend}" / name, content)
    print(f"{out}: {len(files)} files, {len(kd.__all__)} public names, builds for {', '.join(GENERAL['backends'])}")


def package() -> dict[str, bytes]:
    """The files of torch-ext/kdkernels, by their names in it. _ops.py is kernel-builder's to write."""
    paths = files_of(units({home(name) for name in kd.__all__}))
    out = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in paths if path.name != "_ops.py"}
    problems = [f"{name}: {problem}" for name, content in out.items() for problem in refused(content.decode())]
    if problems:
        raise SystemExit("\n".join(["a kernel imports itself (relatively), torch and Python's own, but", *problems]))
    return {"__init__.py": init().encode(), **out}


def home(name: str) -> str:
    """The unit, a module or package right under kdkernels/, of a public name; some public names are units."""
    return kd._HOME.get(name, name)


def units(wanted: set[str]) -> set[str]:
    """Those wanted and all that they import."""
    found: set[str] = set()
    while wanted - found:
        found |= wanted
        wanted = {unit for path in files_of(found) for unit in imported(path)}
    return found


def files_of(units: set[str]) -> list[Path]:
    return sorted(path for unit in units for path in (*PACKAGE.glob(f"{unit}.py"), *PACKAGE.glob(f"{unit}/**/*.py")))


def imported(path: Path) -> set[str]:
    """Units that a file imports."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*inside[: len(inside) - node.level + 1], *(node.module.split(".") if node.module else [])]
            out |= {[*base, alias.name][0] for alias in node.names}
    return out


def refused(source: str) -> list[str]:
    """Imports of what is not there for a kernel, also those inside functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return [f"imports {name}" for name in names if name.partition(".")[0] not in MAY_IMPORT]


def init() -> str:
    imports = [f"from .{home} import {', '.join(sorted(names))}" for home, names in sorted(kd._HOMES.items())]
    imports += [f"from . import {name}" for name in kd.__all__ if name not in kd._HOME]
    names = "".join(f'    "{name}",\n' for name in kd.__all__)
    lines = [f'"""{kd.__doc__.splitlines()[0]}"""', "", *imports, "", f'__version__ = "{kd.__version__}"']
    return "\n".join([*lines, f"__all__ = [\n{names}]", ""])


def build(files: dict[str, bytes], backend: str) -> dict[str, bytes]:
    """The files of build/torch-<backend>."""
    name = f"_kdkernels_{backend}_{sha256(repr(sorted(files.items())).encode()).hexdigest()[:7]}"
    more = {"_ops.py": OPS, "kdkernels/__init__.py": OLDER}
    out = files | {path: content.format(build=name).encode() for path, content in more.items()}
    metadata = {
        **{key: GENERAL[key] for key in ("name", "version", "license")},
        "id": name,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {path: digest(content) for path, content in sorted(out.items())}},
    }
    return out | {"metadata.json": json.dumps(metadata, indent=2).encode()}


def digest(content: bytes) -> str:
    return base64.b64encode(sha256(content).digest()).decode()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    main()
