"""Plackett-Luce over the student's top-k candidates: [C, K] arithmetic, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def plackett_luce(student_logits: Tensor, teacher_logits: Tensor, teacher_top: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the teacher's order of the candidates that exist, and its gradient (TSD-KD eq. 4).

    student_logits [C, K] in the student's descending order, teacher_logits [C, K] of the same words, the teacher's
    largest logits teacher_top [C] -> value [C], gradient [C, K] with respect to student_logits; NaN where the teacher's
    logits have no order.
    """
    order = reference.teacher_order(teacher_logits, teacher_top)
    none = teacher_logits.isnan().any(-1) | ~teacher_top.isfinite()
    ranked = student_logits.gather(-1, order).masked_fill(none[:, None], torch.nan).double()
    value = reference.plackett_luce(ranked).to(student_logits.dtype)
    gradient = reference.plackett_luce_gradient(ranked).to(student_logits.dtype)
    return value, gradient.scatter(-1, order, gradient)
