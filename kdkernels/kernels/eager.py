"""Row kernels in plain PyTorch, from reference.py: any device and dtype, and the yardstick of the other backends.

Works through a few tokens at a time, because the formulas hold a dozen full-vocabulary tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence
from .interface import Backend, Coefficients, Request, Rows, refused_dtype

_BLOCK = 1 << 23  # bytes of the logits of a step, in at least fp32; 14 tensors of that are the workspace


def _steps(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, _BLOCK // (vocabulary * max(4, logits.itemsize)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _z(rows: Rows) -> Tensor:
    """z in at least fp32."""
    x = rows.logits
    z = rows.scale * (x if x.dtype == torch.float64 else x.float())
    return z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)


class Eager(Backend):
    name = "eager"

    def refusal(self, request: Request) -> str:
        return refused_dtype(request, lambda dtype: dtype.is_floating_point)

    def workspace(self, rows: int, vocabulary: int) -> int:
        return 14 * max(min(_BLOCK, 8 * rows * vocabulary), 8 * vocabulary)

    def statistics(
        self, logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
    ) -> Rows:
        out = Rows.empty(logits, scale, softcap, topk, gather)
        for step in _steps(logits):
            z = _z(out[step])
            top = z.max(-1).values
            shifted = z - top[:, None]
            out.stats[step, 0] = top
            out.stats[step, 1] = shifted.logsumexp(-1)
            out.stats[step, 2] = reference.entropy(shifted)
            out.stats[step, 3] = (shifted / temperature).logsumexp(-1)
            out.stats[step, 4:6] = out.stats[step, 1:4:2].exp()
            out.stats[step, 6] = out.stats[step, 1] - out.stats[step, 2]
            out.top_indices[step] = reference.candidates(z, topk) if topk > 1 else z.argmax(-1, keepdim=True)
            out.top_values[step] = z.gather(-1, out.top_indices[step])
            if gather is not None:
                out.gathered[step] = z.gather(-1, gather[step])
        return out

    def divergence(
        self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float
    ) -> tuple[Tensor, Tensor]:
        value = student.stats.new_empty(student.stats.shape[0])
        for step in _steps(student.logits):
            value[step] = reference.divergence(_z(student[step]), _z(teacher[step]), divergence, temperature)
        return value, value  # reference.divergence_gradient finds the centre itself

    def gradient_(
        self,
        student: Rows,
        teacher: Rows | None,
        divergence: Divergence | None,
        temperature: float,
        center: Tensor | None,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        for step in _steps(student.logits):
            rows, c = student[step], coefficients
            c_divergence, c_entropy, c_softmax = (part[step, None] for part in c.dense)
            z = _z(rows)
            gradient = c_entropy * reference.entropy_gradient(z) + c_softmax * z.softmax(-1)
            if divergence is not None:
                z_t = _z(teacher[step])
                gradient += c_divergence * reference.divergence_gradient(z, z_t, divergence, temperature)
            gradient.scatter_add_(-1, c.ids[step], c.scatter[step])
            if rows.softcap is not None:
                gradient *= 1 - (z / rows.softcap).square()
            out[step] = gradient * rows.scale


BACKEND = Eager()
