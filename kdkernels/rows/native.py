"""Row kernels in C++ for CPU tensors (csrc/): float32 and bfloat16 logits, fp32 arithmetic."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..divergences import Divergence
from .interface import Coefficients, Rows

_library = next(Path(__file__).parent.parent.glob("_C*.so"), None)
if _library is None:
    raise ImportError("kdkernels._C is not built: install the package (pip install .) where a C++ compiler is at hand")
torch.ops.load_library(_library)
_ops = torch.ops.kdkernels


_STATS = 7  # csrc/rows.h: struct Stats


def supports(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


def isa() -> str:
    """Instruction set in use: avx512, avx2 or portable (KDKERNELS_CPU_ISA forces one)."""
    return _ops.cpu_isa()


def workspace(vocabulary: int) -> int:
    return torch.get_num_threads() * (vocabulary // 16 + 16384)  # group maxima and blocks, per thread


def statistics(
    logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
) -> Rows:
    rows = logits.shape[0]
    stats, values = (logits.new_empty((rows, n), dtype=torch.float32) for n in (_STATS, topk))
    indices = logits.new_empty((rows, topk), dtype=torch.int64)
    gathered = None if gather is None else stats.new_empty(gather.shape)
    _ops.row_statistics(logits, scale, softcap or 0.0, temperature, stats, values, indices, gather, gathered)
    return Rows(logits, scale, softcap, stats, values, indices, gathered)


def divergence(student: Rows, teacher: Rows, kind: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
    value = student.stats.new_empty(student.logits.shape[0])
    center = torch.empty_like(value, dtype=torch.float64)  # a rounded one leaves a gradient that does not sum to 0
    _ops.row_divergence(*_sides(student), *_sides(teacher), *_scalars(kind), temperature, value, center)
    return value, center


def gradient_(
    student: Rows,
    teacher: Rows | None,
    kind: Divergence | None,
    temperature: float,
    center: Tensor | None,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    scalars = _scalars(kind) if kind else (0.0, 0.0, 0.0, 0.0)
    other = _sides(teacher) if kind else (None, 1.0, 0.0, None)
    c, narrow = coefficients, out.dtype == torch.bfloat16
    _ops.row_gradient_(*_sides(student), *other, *scalars, temperature, center, c.dense, c.ids, c.scatter, narrow)


def _sides(rows: Rows) -> tuple:
    return rows.logits, rows.scale, rows.softcap or 0.0, rows.stats


def _scalars(kind: Divergence) -> tuple[float, float, float, float]:
    return kind.a, kind.b, kind.mix, kind.skew
