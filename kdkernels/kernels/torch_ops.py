"""Backends whose sweeps are torch operators: here Rows become tensors and numbers, and what is written is allocated.

Each such backend has the same three operators (native: python_bindings/ops.cpp; Triton: triton.py). They mutate what
they write, return nothing and know no autograd (the chunk loop does):

    row_statistics(logits, scale, softcap, temperature, stats!, top_values!, top_indices!, gather_ids, gathered!)
    row_divergence(student, scale, softcap, stats, teacher, scale, softcap, stats, a, b, mix, skew, temperature,
                   value!, center!)
    row_gradient_(student!, ... temperature, center, coefficients, ids, scatter, out_dtype)

where softcap 0 means none and ``row_gradient_`` writes words of ``out_dtype`` over the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import Divergence
from .interface import Coefficients, Rows

STATS = 7  # max, log-sum, entropy, log-sum at the temperature (interface.py); then for these operators alone:
# what the log-sums are the logarithms of, and E_q[z - max]. A rounded log-sum of 10 would err by 4 ulp of every q.

NAMES = ("row_statistics", "row_divergence", "row_gradient_")


@dataclass(frozen=True)
class Operators:
    """The functions of a backend (see ``rows``) over its operators."""

    row_statistics: Callable
    row_divergence: Callable
    row_gradient_: Callable

    @staticmethod
    def registered(prefix: str) -> Operators:
        """torch.ops.kdkernels.<prefix>*, which get their fake kernels: nothing is returned, so nothing to do."""
        for name in NAMES:
            torch.library.register_fake(f"kdkernels::{prefix}{name}", lambda *_: None)
        return Operators(*(getattr(torch.ops.kdkernels, prefix + name).default for name in NAMES))

    def statistics(
        self, logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
    ) -> Rows:
        rows = logits.shape[0]
        stats = logits.new_empty((rows, STATS), dtype=torch.float32)
        values = stats.new_empty(rows, topk)
        indices = stats.new_empty((rows, topk), dtype=torch.int64)
        gathered = None if gather is None else stats.new_empty(gather.shape)
        self.row_statistics(logits, scale, softcap or 0.0, temperature, stats, values, indices, gather, gathered)
        return Rows(logits, scale, softcap, stats, values, indices, gathered)

    def divergence(self, student: Rows, teacher: Rows, kind: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
        rows = student.stats.shape[0]
        value = student.stats.new_empty(rows)
        center = value.new_empty((rows, 3), dtype=torch.float64)  # rounded, the gradient would not sum to 0
        self.row_divergence(*_side(student), *_side(teacher), *_scalars(kind), temperature, value, center)
        return value, center

    def gradient_(
        self,
        student: Rows,
        teacher: Rows | None,
        kind: Divergence | None,
        temperature: float,
        center: Tensor | None,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        scalars = _scalars(kind) if kind else (0.0, 0.0, 0.0, 0.0)
        other = _side(teacher) if kind else (None, 1.0, 0.0, None)
        c = coefficients
        self.row_gradient_(
            *_side(student), *other, *scalars, temperature, center, c.dense, c.ids, c.scatter, out.dtype
        )  # fmt: skip


def _side(rows: Rows) -> tuple:
    return rows.logits, rows.scale, rows.softcap or 0.0, rows.stats


def _scalars(kind: Divergence) -> tuple[float, float, float, float]:
    return kind.a, kind.b, kind.mix, kind.skew
