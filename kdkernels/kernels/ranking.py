"""Plackett-Luce over the student's top-k candidates: [C, K] arithmetic, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def plackett_luce(student_logits: Tensor, teacher_logits: Tensor, teacher_top: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the teacher's order of the student's candidates, and its gradient.

    Candidates that are masked do not take part.

    Args:
        student_logits: [C, K], the student's largest logits in descending order.
        teacher_logits: [C, K], the teacher's logits of the same entries.
        teacher_top: [C], the teacher's largest logit of all entries.

    Returns:
        Value [C], and its gradient [C, K] with respect to ``student_logits``. NaN where the teacher's logits have no
        order, because one is NaN or all are masked.

    Source:
        "TSD-KD", eq. 4 (arXiv 2603.13260).
    """
    order = reference.teacher_order(teacher_logits, teacher_top)
    none = teacher_logits.isnan().any(-1) | ~teacher_top.isfinite()
    ranked = student_logits.gather(-1, order).masked_fill(none[:, None], torch.nan).double()
    value, gradient = (each.to(student_logits.dtype) for each in reference.plackett_luce_with_gradient(ranked))
    return value, gradient.scatter(-1, order, gradient)
