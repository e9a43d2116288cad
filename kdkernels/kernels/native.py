"""Row kernels in C++ for CPU tensors (csrc/): float32, bfloat16 and float16 logits, fp32 arithmetic."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from .torch_ops import OperatorBackend, Operators

_library = next(Path(__file__).parent.parent.glob("_C*.so"), None)
if _library is None:
    raise ImportError("kdkernels._C is not built: install the package (pip install .) where a C++ compiler is at hand")
torch.ops.load_library(_library)


class Native(OperatorBackend):
    name = "native"

    def workspace(self, rows: int, vocabulary: int) -> int:
        return torch.get_num_threads() * (vocabulary // 8 + 24576)  # group maxima and blocks, per thread

    def traits(self) -> frozenset[str]:
        """What decides whose matrix products are faster (csrc/gemm.h): the instruction set that products take,
        avx512_bf16, avx512, avx2 or portable, and whether this CPU is Intel's or Arm's or has matrix tiles."""
        return _traits()

    def isa(self) -> str:
        """Instruction set in use: avx512, avx2 or portable (KDKERNELS_CPU_ISA forces one)."""
        return torch.ops.kdkernels.cpu_isa()


@cache
def _traits() -> frozenset[str]:
    return frozenset(torch.ops.kdkernels.cpu_traits().split())


BACKEND = Native(Operators.registered())
