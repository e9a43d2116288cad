"""Builds csrc/ and python_bindings/ into kdkernels/_C; everything else about the package is in pyproject.toml."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            "kdkernels._C",
            sources=sorted(glob("csrc/*.cpp") + glob("python_bindings/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            extra_compile_args=[
                "-O3",
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
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
