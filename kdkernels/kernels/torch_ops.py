"""Backends whose sweeps are three functions: native (python_bindings/ops.cpp) and Triton (triton/backend.py).

They take tensors and numbers, write into tensors that are allocated here, return nothing and know nothing of autograd
(engine/ does). Native's are torch operators. Triton's are plain functions: the engine's own operators are what PyTorch
sees, and one more would cost 5 microseconds a call.

    row_statistics(logits, scale, softcap, temperature, stats!, top_values!, top_indices!, gather_ids, gathered!)
    row_divergence(student, scale, softcap, stats, teacher, scale, softcap, stats, a, b, mix, skew, temperature, sums!)
    row_gradient_(student!, ... temperature, sums, coefficients, ids, scatter, out_dtype)

where softcap 0 means none and ``row_gradient_`` writes numbers of ``out_dtype`` over the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..divergences import Divergence
from .interface import SUMS, Backend, Coefficients, Request, Rows, refused_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operators(NamedTuple):
    """The three functions of a backend."""

    row_statistics: Callable
    row_divergence: Callable
    row_gradient_: Callable

    @staticmethod
    def registered() -> Operators:
        """Those that are registered with torch. Their fake kernels have nothing to do, because nothing is returned."""
        for name in Operators._fields:
            torch.library.register_fake(add_op_namespace_prefix(name), lambda *_: None)
        return Operators(*(getattr(ops, name).default for name in Operators._fields))


class OperatorBackend(Backend):
    """A backend whose sweeps call its operators; fp32 arithmetic."""

    def __init__(self, operators: Operators):
        self.operators = operators

    def refusal(self, request: Request) -> str:
        return refused_dtype(request, lambda dtype: dtype in _DTYPES)

    def statistics(
        self, logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
    ) -> Rows:
        out = Rows.empty(logits, scale, softcap, topk, gather)
        self.operators.row_statistics(
            logits, scale, softcap or 0.0, temperature, out.stats, out.top_values, out.top_indices, gather, out.gathered
        )
        return out

    def divergence_sums(self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float) -> Tensor:
        sums = student.stats.new_empty((student.stats.shape[0], SUMS), dtype=torch.float64)
        self.operators.row_divergence(
            *_operands(student), *_operands(teacher), *_scalars(divergence), temperature, sums
        )
        return sums

    def gradient_(
        self,
        student: Rows,
        teacher: Rows | None,
        divergence: Divergence | None,
        temperature: float,
        sums: Tensor | None,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        scalars = _scalars(divergence) if divergence else (0.0, 0.0, 0.0, 0.0)
        other = _operands(teacher) if divergence else (None, 1.0, 0.0, None)
        c = coefficients
        self.operators.row_gradient_(
            *_operands(student), *other, *scalars, temperature, sums, c.dense, c.ids, c.scatter, out.dtype
        )


def _operands(rows: Rows) -> tuple:
    return rows.logits, rows.scale, rows.softcap or 0.0, rows.stats


def _scalars(divergence: Divergence) -> tuple[float, float, float, float]:
    return divergence.a, divergence.b, divergence.mix, divergence.skew
