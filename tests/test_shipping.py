"""What is shipped: wheel and sdist hold what they must and nothing else, and the wheel runs beside torch alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import kdkernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are made for Linux")

ROOT = Path(__file__).parent.parent
SOURCES = ("kdkernels", "csrc", "python_bindings")
MACHINE = os.uname().machine
OTHERS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Builds sdists and wheels of several folders as pip does, but with an extension that lies there: it compiles nothing.
BUILD = """
import os, shutil, sys
from pathlib import Path
from setuptools import build_meta
from torch.utils.cpp_extension import BuildExtension

def take(self):
    place = Path(self.get_ext_fullpath("kdkernels._C"))
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy("../extension.so", place)

BuildExtension.build_extensions = take
for folder in sys.argv[1:]:
    os.chdir(Path(folder, "tree"))
    build_meta.build_sdist("../out")
    build_meta.build_wheel("../out")
"""
USE = """
import sys, torch
import kdkernels as kd
from kdkernels.cli import main

torch.manual_seed(0)
hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
teacher = kd.Head(torch.randn(2, 5, 12), torch.randn(97, 12))
out = kd.TSDKD()(kd.Head(hidden, weight), teacher, torch.ones(2, 5, dtype=torch.bool))
out.loss.backward()
assert torch.isfinite(out.loss) and hidden.grad.abs().max() > 0 and weight.grad.abs().max() > 0
assert kd.info()["devices"]["cpu"] == "native", kd.info()
for name in kd.__all__:
    getattr(kd, name)
print(kd.__file__)
print(main(["train", "recipes/first.toml"]))
print(sorted({"deepspeed", "numpy", "transformers"} & set(sys.modules)))
"""


class Built(NamedTuple):
    folder: Path  # of the sdist and the wheel
    young: Path  # of those with an extension that needs a younger system
    said: str

    @property
    def wheel(self) -> Path:
        return next(self.folder.glob("*.whl"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    folders = [tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("young")]
    for folder, planted in zip(folders, (b"", b"\0GLIBC_2.29\0GLIBC_ABI_DT_RELR\0GLIBC_2.9\0"), strict=True):
        copied(folder / "tree")
        (folder / "out").mkdir()
        (folder / "extension.so").write_bytes(its_extension().read_bytes() + planted)
    done = subprocess.run([sys.executable, "-c", BUILD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Built(folders[0] / "out", folders[1] / "out", done.stderr)


def its_extension() -> Path:
    (extension,) = Path(kdkernels.__file__).parent.glob("_C*.so")
    return extension


def copied(tree: Path) -> Path:
    """The files that a package is built from, and others that must not get into it."""
    for name in (*SOURCES, "tests", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in OTHERS:
        shutil.copy(ROOT / name, tree)
    return tree


def package(pattern: str = "*.py") -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "kdkernels").rglob(pattern)}


def test_the_sdist_has_all_that_a_build_needs(built):
    (archive,) = built.folder.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {f"{folder}/{path.name}" for folder in SOURCES[1:] for path in (ROOT / folder).iterdir()}
    assert {"csrc/sweeps.h", "csrc/rows_avx512.cpp", "python_bindings/ops.cpp"} <= needed
    assert {*needed, *package(), *package("*.toml"), *OTHERS, "kdkernels/py.typed"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {*SOURCES, "kdkernels.egg-info"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_the_package_and_its_extension(built):
    names = set(zipfile.ZipFile(built.wheel).namelist())
    told = {name for name in names if ".dist-info/" in name}
    assert "kdkernels/curation/prompts/code.toml" in package("*.toml")
    assert names - told == {*package(), *package("*.toml"), "kdkernels/py.typed", "kdkernels/_C.abi3.so"}
    assert any(name.endswith("licenses/LICENSE") for name in told)


def test_tags(built):
    """Of every Python from 3.10 on, and of manylinux_2_28 where the symbols are old enough."""
    start = f"kdkernels-{kdkernels.__version__}-cp310-abi3-"
    system = "manylinux_2_28" if old_enough(its_extension()) else "linux"
    assert built.wheel.name == f"{start}{system}_{MACHINE}.whl"
    assert [path.name for path in built.young.glob("*.whl")] == [f"{start}linux_{MACHINE}.whl"]
    assert re.search("no manylinux_2_28 wheel: the extension needs GLIBC_2.29.*GLIBC_ABI_DT_RELR", built.said)
    assert "GLIBC_2.9" not in built.said


def old_enough(extension: Path) -> bool:
    """As PEP 600 and AlmaLinux 8 have it, read from the symbols that objdump sees."""
    allowed = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    needed = set(re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)", told("objdump", "-T", extension)))
    assert len(needed) > 5
    return all(tuple(map(int, version.split("."))) <= allowed[name] for name, version in needed)


def told(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_extension_needs_nothing_but_the_stable_interfaces():
    """No function of Python's and none of torch's C++: one file serves every Python, and every torch from 2.10 on."""
    names = {line.split()[-1].partition("@")[0] for line in told("nm", "-Du", its_extension()).splitlines()}
    assert {"torch_parallel_for", "aoti_torch_get_data_ptr"} <= names
    assert not {name for name in names if re.match(r"_?Py[A-Z_]|_ZN?K?(2at|3c10|5torch)", name)}
    dynamic = told("readelf", "-d", its_extension())
    assert "libtorch_cpu.so" in dynamic and not re.search("RPATH|RUNPATH|libtorch_python|libpython|libgomp", dynamic)


def beside_torch_alone(wheel: Path, folder: Path) -> str:
    """What USE says where there is nothing but torch, its own requirements and the wheel: no compiler, no trainer."""
    site = folder / "site"
    site.mkdir()
    for entry in requirements("torch"):
        (site / entry.name).symlink_to(entry)
    with zipfile.ZipFile(wheel) as unpacked:
        unpacked.extractall(site)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    environment = {"PYTHONPATH": str(site), "PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "ignore", "-c", USE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(site / "kdkernels" / "__init__.py"), "2", "[]"]
    return done.stderr


def requirements(name: str, found: set[str] | None = None) -> set[Path]:
    """Files and folders in site-packages of a distribution and of what it needs."""
    found = set() if found is None else found
    found.add(name)
    distribution = importlib.metadata.distribution(name)
    out = {Path(distribution.locate_file(file.parts[0])) for file in distribution.files if ".." not in file.parts}
    for line in distribution.requires or []:
        needed = re.match(r"[\w.-]+", line)[0]
        if "extra ==" not in line and needed not in found and installed(needed):
            out |= requirements(needed, found)
    return {path for path in out if path.name != "__pycache__"}


def installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def test_the_wheel_runs_beside_torch_alone(built, tmp_path):
    said = beside_torch_alone(built.wheel, tmp_path)
    assert re.search(r"kdkernels\.training needs \w+: pip install kdkernels\[train\]", said)


@pytest.mark.slow
def test_a_wheel_is_built_from_the_sdist(tmp_path):
    """`make wheel`, the compiler included; the wheel has every instruction set."""
    tree = copied(tmp_path / "tree")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (tmp_path / "use").mkdir()
    beside_torch_alone(wheel, tmp_path / "use")
    extension = tmp_path / "use" / "site" / "kdkernels" / "_C.abi3.so"
    for place in (tmp_path, Path(sys.prefix)):
        assert str(place).encode() not in extension.read_bytes()
    if MACHINE == "x86_64":
        code = told("objdump", "-d", extension)
        assert all(word in code for word in ("zmm", "ymm", "vdpbf16ps"))
