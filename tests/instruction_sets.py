"""Whose matrix products there are on this CPU, of which instruction sets, and matrices for them."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from kdkernels.compute import gemm
from kdkernels.kernels import backend_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


def products_of(dtype: torch.dtype) -> gemm.Torch:
    return backend_for(CPU, dtype).products(CPU, dtype)


def of_this_cpu() -> tuple[str, set[str]]:
    """What Linux says of it, and its instruction sets."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return cpu, set(re.search(r"^flags\s*:(.*)$|\Z", cpu, re.MULTILINE)[0].split())


AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEEDED = {"avx512": AVX512 | {"avx512_bf16"}, "avx512_nobf16": AVX512, "avx2": {"avx2", "fma"}, "portable": set()}
SETS = [name for name, flags in NEEDED.items() if flags <= of_this_cpu()[1]]  # of instructions that this CPU has
try:
    importlib.import_module("kdkernels.kernels.native")
except ImportError:  # as where only a GPU is tested; test_registry.py fails
    SETS = []
needs_native = pytest.mark.skipif(not SETS, reason="the extension is not built")


def matrix(rows: int, columns: int, dtype: torch.dtype, pad: int, transposed: bool = False) -> torch.Tensor:
    """Normal numbers with NaN around them, which must not be read."""
    if transposed:
        return matrix(columns, rows, dtype, pad).t()
    around = torch.full((rows * (columns + pad) + pad,), torch.nan, dtype=dtype)
    return around[pad:].view(rows, columns + pad)[:, :columns].normal_()
