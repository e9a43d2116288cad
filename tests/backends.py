"""The backends that the suites run on: those of a CPU, unless KDKERNELS_TEST_BACKENDS names others (test_triton.py)."""

import os

import torch

BACKENDS = os.environ.get("KDKERNELS_TEST_BACKENDS", "eager,native").split(",")
COMPILED = [name for name in BACKENDS if name != "eager"]  # those with operators
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # milliseconds per block of entries: few examples
EXAMPLES = 2 if INTERPRETED else 40

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
_DTYPES = {"eager": (F64, F32, BF16), "native": (F32, BF16, F16), "triton": (F32,) if INTERPRETED else (F32, BF16, F16)}
PRECISIONS = [(name, dtype) for name in BACKENDS for dtype in _DTYPES[name]]
