"""Plackett-Luce over the student's top-k candidates: [C, K] arithmetic, the same for every backend."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def plackett_luce(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the teacher's order of the candidates, and its gradient (TSD-KD eq. 4).

    student_logits [C, K] in the student's descending order, teacher_logits [C, K] of the same words
    -> value [C], gradient [C, K] with respect to student_logits.
    """
    order = reference.teacher_order(teacher_logits)
    ranked = student_logits.gather(-1, order)
    ranked = ranked - ranked.max(-1, keepdim=True).values  # the likelihood ignores a shift
    gradient = reference.plackett_luce_gradient(ranked)
    return reference.plackett_luce(ranked), gradient.scatter(-1, order, gradient)
