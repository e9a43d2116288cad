"""Builds csrc/ and python_bindings/ into kdkernels/_C; everything else about the package is in pyproject.toml."""

import platform
import re
import sys
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Places of this machine, which a binary shall not name.
PLACES = (Path(__file__).resolve().parent, Path(torch.__file__).parent)
# The youngest symbols that manylinux_2_28 allows. torch's own wheels are of that kind.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def too_young(library: bytes) -> list[str]:
    """Versions of symbols that this shared library needs and that a manylinux_2_28 system may not have."""
    needed = set(re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([^\0]+)(?=\0)", library))
    return sorted(
        f"{name}_{version}"
        for name, version in ((name.decode(), version.decode()) for name, version in needed)
        if not re.fullmatch(r"[\d.]+", version) or numbers(version) > MANYLINUX_2_28[name]
    )


class Wheel(bdist_wheel):
    """A wheel for manylinux_2_28 where the extension runs there; else for the system that it was built on, like any."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        libc, version = platform.libc_ver()
        libraries = [path.read_bytes() for path in Path(self.bdist_dir).rglob("*.so")]  # none if it is editable
        if not libraries or libc != "glibc" or numbers(version) < MANYLINUX_2_28["GLIBC"]:
            return python, abi, system
        young = [name for library in libraries for name in too_young(library)]
        if young:
            print(f"no manylinux_2_28 wheel: the extension needs {', '.join(young)}", file=sys.stderr)
            return python, abi, system
        return python, abi, re.sub("^linux_", "manylinux_2_28_", system)


setup(
    ext_modules=[
        CppExtension(
            "kdkernels._C",
            sources=sorted(glob("csrc/*.cpp") + glob("python_bindings/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            extra_compile_args=[
                "-O3",
                "-g0",  # Python's own flags ask for debug information: 5 of 6 MB
                *(f"-fmacro-prefix-map={place}/=" for place in PLACES),
                "-std=c++17",
                "-fno-math-errno",
                "-ffp-contract=fast",
                "-Wno-psabi",  # vectors wider than the baseline only ever pass between inlined functions
                "-Wno-maybe-uninitialized",  # GCC 12 says so of its own AVX-512 intrinsics
                "-DTORCH_TARGET_VERSION=0x020a000000000000",  # runs on torch 2.10 and later
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
