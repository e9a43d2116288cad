"""Row kernels in plain PyTorch, after reference.py: any device and dtype, and the yardstick of the other backends.

It takes a few tokens at a time, because the formulas need a dozen tensors as large as their logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence
from .interface import SUMS, Backend, Coefficients, Request, Rows, refused_dtype

_BLOCK = 1 << 23  # bytes of the logits of a step, in at least fp32; the workspace is 14 such tensors


def _steps(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, _BLOCK // (vocabulary * max(4, logits.itemsize)))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _z(rows: Rows) -> Tensor:
    """The z of these rows, in at least fp32."""
    x = rows.logits
    z = rows.scale * (x if x.dtype == torch.float64 else x.float())
    return z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)


def _summands(student: Rows, teacher: Rows, divergence: Divergence, temperature: float) -> tuple[Tensor, ...]:
    """What ``Backend.divergence_sums`` sums up, of each entry; reference.py has the formulas.

    From both models' statistics, because the logits may be a part of the vocabulary. ``log_q``, ``log_p`` and ``log_m``
    lack the same number, the log of the teacher's sum: their differences do not need it, and it would be rounded.
    """
    t_sum = teacher.stats[:, 5:6]
    gap = (student.stats[:, 5:6].double() / t_sum.double()).log().to(student.stats.dtype)
    log_q = (_z(student) - student.stats[:, :1]) / temperature - gap
    log_p = (_z(teacher) - teacher.stats[:, :1]) / temperature
    log_m = reference.log_mixture(log_p, log_q, divergence.mix)
    log_q_m, q = log_q - log_m, log_q.exp() / t_sum
    value = log_ratio = skew = shared = torch.zeros_like(q)
    if divergence.a:
        value = divergence.a * reference.xlogy(log_p.exp() / t_sum, log_p - log_m)
    if divergence.b:
        log_ratio = divergence.b * reference.xlogy(q, log_q_m)
        value = value + log_ratio
    if divergence.skew:
        masked = log_q.isneginf()
        shared = torch.where(masked, 0, (log_p + log_q_m).exp() / t_sum)
        skew = torch.where(masked, 0, (log_q + log_q_m).exp() / t_sum) - shared
    return value, log_ratio, skew, shared, q


def _divergence_gradient(
    student: Rows, teacher: Rows, divergence: Divergence, temperature: float, sums: Tensor
) -> Tensor:
    """dD/dz, the student's, from the divergence's sums over the whole vocabulary."""
    _, log_ratio, skew, shared, q = _summands(student, teacher, divergence, temperature)
    mean_log, mean_skew, mean_shared = (sums[:, 1:4] / sums[:, 4:]).to(q.dtype).split(1, dim=1)
    gradient = log_ratio - q * mean_log
    if divergence.skew:
        gradient += divergence.skew * (skew * mean_shared - shared * mean_skew)
    return gradient / temperature


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
            masked = top.isneginf()  # every entry of the row
            out.stats[step, 0] = top.masked_fill(masked, torch.nan)
            out.stats[step, 1] = shifted.logsumexp(-1)
            out.stats[step, 2] = reference.entropy(shifted)
            out.stats[step, 3] = (shifted / temperature).logsumexp(-1)
            out.stats[step, 4] = shifted.exp().sum(-1).masked_fill(masked, 0)
            out.stats[step, 5] = (shifted / temperature).exp().sum(-1).masked_fill(masked, 0)
            out.stats[step, 6] = reference.xlogy(shifted.softmax(-1), shifted).sum(-1)
            out.top_indices[step] = reference.candidates(z, topk) if topk > 1 else z.argmax(-1, keepdim=True)
            out.top_values[step] = z.gather(-1, out.top_indices[step])
            if gather is not None:
                out.gathered[step] = z.gather(-1, gather[step])
        return out

    def divergence_sums(self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float) -> Tensor:
        sums = student.stats.new_empty((student.stats.shape[0], SUMS), dtype=torch.float64)
        for step in _steps(student.logits):
            for column, each in enumerate(_summands(student[step], teacher[step], divergence, temperature)):
                sums[step, column] = each.sum(-1, dtype=torch.float64)
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
        for step in _steps(student.logits):
            rows, c = student[step], coefficients
            c_divergence, c_entropy, c_softmax = (part[step, None] for part in c.dense)
            gradient = 0.0
            if divergence is not None:
                of_divergence = _divergence_gradient(rows, teacher[step], divergence, temperature, sums[step])
                gradient = c_divergence * of_divergence
            z = _z(rows)
            x = z - rows.stats[:, :1]
            q = x.exp() / rows.stats[:, 4:5]
            gradient = gradient + c_entropy * (q * rows.stats[:, 6:7] - reference.xlogy(q, x)) + c_softmax * q
            gradient.scatter_add_(-1, c.ids[step], c.scatter[step])
            if rows.softcap is not None:
                gradient *= 1 - (z / rows.softcap).square()
            out[step] = gradient * rows.scale


BACKEND = Eager()
